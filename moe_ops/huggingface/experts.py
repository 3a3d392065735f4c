NAME = "moe_ops"


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    raise NotImplementedError
