"""MixCon-JAX: pretrain hybrid sequence models of attention, Conba and experts."""
