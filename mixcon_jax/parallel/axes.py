"""The mesh axes by name, and what each shares out. Loads no JAX."""

AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp')  # the mesh axes that share out the rows of a batch
SEQUENCE_AXIS = 'context'  # the mesh axis that shares out the tokens of a row

# Logical axis -> mesh axes. A name that is absent stays whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    'batch': BATCH_AXES,
    'sequence': (SEQUENCE_AXIS,),
    'shards': (*BATCH_AXES, SEQUENCE_AXIS),
    'embed': ('fsdp',),
    'mlp': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'inner': ('tensor',),
    'vocab': ('tensor',),
    'experts': ('expert',),
}
