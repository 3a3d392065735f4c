"""The quantizer that transformers calls from from_pretrained, save_pretrained, Trainer and generate.

It may be imported while transformers is half imported: at the top it imports no more of it than its base classes.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from ..backends.base import FLOATS
from ..checkpoints.kv import ATTRIBUTE
from ..experts import QuantizedExperts, canonical_biases_
from ..formats import FORMATS
from ..quantize import dequantize_, replace_
from ..rules import Rules, parse
from ..storage import QuantizedModule
from ..streaming import Stream, streams
from ..summary import remember_left
from ..targets import Plan, Target, plan
from . import disk
from .attach import keep_names
from .config import MoeOpsConfig

_SHOWN = 10


class MoeOpsQuantizer(HfQuantizer):
    """Streams float checkpoints into quantized modules, and loads and saves quantized ones as they are.

    `pre_quantized` says which. In between, `_streams` maps names of float parameters to what quantizes them.
    """

    requires_calibration = False
    quantization_config: MoeOpsConfig

    def __init__(self, quantization_config: MoeOpsConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # it comes to describe this model
        self.problems: list[str] = []
        self._streams: dict[str, tuple[Stream, str]] = {}
        self._expected: dict[str, dict[str, tuple[torch.dtype, torch.Size]]] = {}
        self._sizes: dict[str, float] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._input_scales: dict[str, list[int]] = {}
        self._late: list[Target] = []
        self._float_experts: list[str] = []
        self._files: list[str] = []
        self._model: Any = None
        self._ranks: Any = None

    # Before loading

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with the device map as given, and again as it was worked out."""
        if not isinstance(device_map, dict):
            return
        places = {str(d) for d in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"quantized modules cannot be offloaded, and this device map puts modules on"
                f" {', '.join(sorted(places))}: give one without disk, and with cpu for all or for none"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """A model that is quantized everywhere says the type of its codes; anything else is the user's choice."""
        saved = self.quantization_config.dtype
        if dtype not in FLOATS and self.pre_quantized and saved is not None and dtype.itemsize == 1:
            return getattr(torch, saved)
        if dtype not in FLOATS:
            raise ValueError(f"dtype={dtype}: ops compute in {', '.join(map(str, FLOATS))}")
        return dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = list(checkpoint_files or ())
        self._files = files if all(str(f).endswith(".safetensors") for f in files) else []
        found = self._plan(model)
        _raise(found.problems)
        remember_left(model, found.left)
        self._model, self._float_experts = model, [row.name for row in found.left if row.kind == "experts"]
        now = [self.pre_quantized or _owns_its_weights(t) for t in found.targets]
        self._late = [t for t, ready in zip(found.targets, now, strict=True) if not ready]
        replace_([t for t, ready in zip(found.targets, now, strict=True) if ready], self.quantization_config.backend)
        self._input_scales = _named_here(model, self.quantization_config.input_scales)
        dtypes = model._get_dtype_plan(model.config.dtype)
        for name, m in streams(model):
            self._in_fp32(name, m, dtypes)
            self._open(name, m)
        self._shapes = {key: t.shape for key, t in model.state_dict().items() if key not in self._streams}
        self._share(model)

    def _share(self, model: Any) -> None:
        """Under a plan of transformers: every rank will keep its part."""
        config = getattr(model.config, "distributed_config", None)
        if config is None:
            return
        from .ranks import Ranks

        self._ranks = Ranks(model, config)
        late = [f"{t.name}: its experts are modules, which a plan cannot share; parallelize_ can" for t in self._late]
        _raise(self._ranks.problems() + late)
        self._ranks.wait({s.name: s for s, _ in self._streams.values()}, self._sizes, self._expected)
        parts = [f"{name}.{key}" for name in self._ranks.shares for key in self._expected.get(name, ())]
        self._shapes = {key: shape for key, shape in self._shapes.items() if key not in parts}  # `_finish` looks

    def _plan(self, model: nn.Module) -> Plan:
        """By the rules as they were given, or by what a checkpoint says of each module."""
        c = self.quantization_config
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # gates are recognised by evaluating them
        try:
            with torch.device("cpu"):
                if not self.pre_quantized:
                    return _without_ties(model, plan(model, parse(c.format, c.ignore), c.strict, loaded=False))
                return _as_saved(model, c)
        finally:
            torch.set_default_dtype(dtype)

    def _in_fp32(self, name: str, m: QuantizedModule, dtypes: dict[str, torch.dtype]) -> None:
        """What the model keeps in fp32 is quantized from fp32, as it would be after it was loaded."""
        from transformers.core_model_loading import build_glob_alternation

        for pattern, dtype in dtypes.items():
            if any(build_glob_alternation([pattern])[0].search(f"{name}.{weight}") for weight in m.weight_names()):
                m.float_dtype = dtype
                for weight in m.weight_names():
                    m.empty_weight(weight, "meta")

    def _open(self, name: str, m: QuantizedModule) -> None:
        if self.pre_quantized:
            for weight in m.weight_names():
                shape = self._input_scales.get(f"{name}.{weight}_input_scale")
                if shape is not None:
                    scale = torch.empty(shape, dtype=torch.float32, device="meta")
                    m._parameters[f"{weight}_input_scale"] = nn.Parameter(scale, requires_grad=False)
            disk.open_(m)
            self._expected[name] = disk.expected(m)
            return
        stored = m.bytes_stored()
        stream = Stream(m, name)
        stream.open()
        numel = sum(m.float_shape(weight).numel() for weight in m.weight_names())
        for weight in m.weight_names():
            self._streams[stream.label(weight)] = (stream, weight)
            self._sizes[stream.label(weight)] = stored / numel

    # While loading

    def target(self, name: str) -> tuple[Stream, str] | None:
        """What quantizes the float parameter of this name."""
        return self._streams.get(name)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._streams

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of codes and scales for each number, for device maps and the warm-up of the allocator."""
        return self._sizes.get(param_name, param.element_size())

    def get_quantize_ops(self) -> Any:
        from .conversion import QuantizeTensor

        return QuantizeTensor(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        return dtype

    def update_weight_conversions(self, weight_conversions: list, model: Any = None) -> list:
        """Ours, and what the checkpoint holds is checked against them before anything is read."""
        from .conversion import streaming

        conversions = [] if self.pre_quantized else streaming(weight_conversions)
        model, self._model = self._model, None
        if self._files and model is not None:
            _raise(self._check(model, conversions))
        return conversions

    def _check(self, model: Any, conversions: list) -> list[str]:
        from . import sources

        stored = sources.headers(self._files)
        found = sources.trace(model, stored, conversions)
        if self.pre_quantized:
            codes = [f"{name}.{key}" for name, m in streams(model) for key in m._parameters if disk.is_code(m, key)]
            want = {key: (t.dtype, t.shape) for key, t in model.state_dict().items()}
            problems = sources.check_codes(found, stored, want, codes, _saved(model))
            ties = model.all_tied_weights_keys.items()
            lost = {one for pair in ties if not any(key in found for key in pair) for one in pair[1:]}
            problems += [f"{name}: the checkpoint lacks it, and what is tied to it" for name in sorted(lost)]
            used, modules = {key for keys in found.values() for key in keys.all()}, self.quantization_config.modules
            below = [key for key in stored if key not in used and key.rpartition(".")[0] in modules]
            return problems + [f"{key}: nothing in the model takes it" for key in below]
        experts_of = {name: s.experts_stored(weight) for name, (s, weight) in self._streams.items()}
        inside = [*self._float_experts, *(name for name, _ in streams(model)), *(t.name for t in self._late)]
        state = {k: t for k, t in model.state_dict().items() if k.startswith(tuple(f"{name}." for name in inside))}
        floats = tuple(f"{name}." for name in self._float_experts)
        experts_of |= {k: t.shape[0] for k, t in state.items() if t.ndim == 3 and k.startswith(floats)}
        parameters = dict(model.named_parameters())
        needed = {key for key in state if key not in experts_of}
        if _same(model):  # else a head of its own may be new
            needed |= {key for key in _saved(model) if key in parameters and key not in experts_of}
        floats_too = {key for key in found if key in parameters and key not in experts_of}
        return sources.check_floats(found, stored, experts_of, sorted(needed), sorted(floats_too))

    # After loading

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._raise_on_all(self.problems)
        # 5.17 compares no shapes where there is a quantizer, and later versions only those of some.
        now = {key: t.shape for key, t in model.state_dict().items() if key in self._shapes}
        _raise([f"{key} must be {tuple(self._shapes[key])}, got {tuple(s)}" for key, s in now.items()
                if s != self._shapes[key]])  # fmt: skip
        self._raise_on_all([text for name, m in streams(model) for text in self._finish(name, m)])
        for name, share in () if self._ranks is None else self._ranks.shares.items():
            share.cut_biases_(model.get_submodule(name))
        if self._ranks is not None:
            self._ranks.sum_gradients()
        self._streams, self._expected, self._sizes, self._shapes = {}, {}, {}, {}
        late, self._late = self._late, []
        replace_(late, self.quantization_config.backend)
        from .. import lowering

        lowering.register()
        if self.quantization_config.kv_scales:
            setattr(model, ATTRIBUTE, _kv_scales(model, self.quantization_config))
        self.quantization_config.refresh(model)
        model.quantization_config = self.quantization_config
        keep_names(model)
        return model

    def _raise_on_all(self, problems: list[str]) -> None:
        if self._ranks is not None:
            from .ranks import agreed

            problems = agreed(problems)
        _raise(problems)

    def _finish(self, name: str, m: QuantizedModule) -> list[str]:
        """What a module lacks once everything has been read."""
        if self.pre_quantized:
            return disk.close_(m, name, self._expected[name])
        try:
            stream, _ = self._streams[f"{name}.{m.weight_names()[0]}"]
            stream.finish()
        except ValueError as e:
            return [str(e)]
        rest = {key: p for key, p in m._parameters.items() if p is not None and not disk.is_code(m, key)}
        if isinstance(m, QuantizedExperts):
            canonical_biases_(m)
        return [f"{name}.{key}: the checkpoint lacks it" for key, p in rest.items() if not disk.loaded(p)]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        parts = [name for name, m in streams(model) if m.ranks is not None]
        _raise([f"{name} holds one rank's part of its weights: save the whole model" for name in parts], "saved")
        self.quantization_config.refresh(model)
        return disk.state(model), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_(model)
        return model if dtype in (None, model.config.dtype) else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of it are."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without adapters, what is float is; `training.check` says what is not before Trainer begins."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _raise(problems: list[str], what: str = "loaded quantized") -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n".join([f"this checkpoint cannot be {what}:", *problems[:_SHOWN], *more]))


def _owns_its_weights(target: Target) -> bool:
    """Not experts whose weights are spread over modules of their own: those are quantized after they were loaded."""
    return target.spec is None or all(name in target.module._parameters for name, *_ in target.spec.matrices)


def _leave(found: Plan, reasons: dict[str, str]) -> Plan:
    for target in list(found.targets):
        note = next((reasons[name] for name in target.names if name in reasons), None)
        if note is not None:
            found.targets.remove(target)
            found.leave(target, "linear" if target.spec is None else "experts", note)
    return found


def _without_ties(model: Any, found: Plan) -> Plan:
    """Leave in float what shares its weight with another parameter, and what the model keeps in fp32."""
    pairs = [pair for one, other in model.all_tied_weights_keys.items() for pair in ((one, other), (other, one))]
    reasons = {one.rpartition(".")[0]: f"tied to {other}" for one, other in pairs}
    return _leave(found, reasons)


def _same(model: Any) -> bool:
    """The checkpoint was saved from a model of this class."""
    return type(model).__name__ in (model.config.architectures or ())


def _saved(model: Any) -> list[str]:
    """What a checkpoint must have, for it was saved from a model like this: all, or what is below a head of its own."""
    below = "" if _same(model) else f"{model.base_model_prefix}."
    ties = model.all_tied_weights_keys
    patterns = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    return [
        key for key in model.state_dict()
        if key.startswith(below) and key not in {*ties, *ties.values()} and not any(re.search(p, key) for p in patterns)
    ]  # fmt: skip


def _here(model: Any, name: str, what: str) -> str:
    """The name here of a module of the checkpoint, which may have been saved with or without a head."""
    have, prefix = {name for name, _ in model.named_modules()}, f"{model.base_model_prefix}."
    known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in have]
    if not known:
        raise ValueError(f"the checkpoint has {name} {what}, this {type(model).__name__} has no such module")
    return known[0]


def _named_here(model: Any, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Parameters of the checkpoint, under the names that they have here."""
    split = [(*key.rpartition(".")[::2], shape) for key, shape in shapes.items()]
    return {f"{_here(model, module, f'with {leaf}')}.{leaf}": shape for module, leaf, shape in split}


def _kv_scales(model: Any, config: MoeOpsConfig) -> dict[str, tuple[float, ...]]:
    return {_here(model, name, "with KV scales"): tuple(pair) for name, pair in config.kv_scales.items()}


def _as_saved(model: Any, config: MoeOpsConfig) -> Plan:
    """The modules of a checkpoint of ours, in the formats that it has them in."""
    if not config.modules:
        raise ValueError("config.json says quant_method moe_ops, and of no module how it is stored")
    wanted: dict[str, Any] = {
        _here(model, name, f"in {stored}"): FORMATS[stored] for name, stored in config.modules.items()
    }
    _kv_scales(model, config)  # refused before anything is read
    found = plan(model, Rules(wanted, {}, {}, ()), strict=True, loaded=False)
    built = {name for target in found.targets for name in target.names}
    notes = {row.name: row.note for row in found.left}
    found.problems += [
        f"{name} is stored in {stored.name}, and cannot be built so: {notes.get(name, 'it is no Linear or experts')}"
        for name, stored in wanted.items()
        if name not in built
    ]
    return found


def register() -> None:
    """Not through transformers' decorators, which refuse a name that is taken: a reload registers again."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[MoeOpsConfig.METHOD] = MoeOpsConfig
    auto.AUTO_QUANTIZER_MAPPING[MoeOpsConfig.METHOD] = MoeOpsQuantizer


register()
