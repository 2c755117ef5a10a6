"""Plans for tests: a small model, planned once for each question, and plans that take no time."""

import functools

from mixcon_jax import config as configs
from mixcon_jax.planner import plan as planner

SMALL = {
    'model.dim': 64, 'model.vocab_size': 512, 'model.num_blocks': 2, 'model.pattern': ('attention+mlp',),
    'model.attention.num_heads': 4, 'model.attention.num_kv_heads': 2, 'model.mlp.hidden_dim': 128, 'model.unroll': 1,
    'data.seq_len': 64, 'train.batch_size': 8,
}  # fmt: skip


def configuration(devices, options):
    config = configs.default()
    for key, value in (SMALL | dict(options)).items():
        configs.put(config, key, value)
    return configs.validate(config, devices)


@functools.cache
def planned(hosts, per_host, options=(), what='train'):
    """A plan with products by cuBLAS, on so many H100s."""
    job = {'target': 'h100', 'hosts': hosts, 'per_host': per_host, 'what': what, 'batch': 2, 'context': 0}
    return planner.plan(configuration(hosts * per_host, options), job, ['cublas'], 2**30)


FOUND = {
    'compiler_memory': 2**30,
    'mesh': {'data': 1, 'fsdp': 4}, 'parameters': 10, 'gradients': 10, 'moments': 20, 'state': 0, 'layout': [],
    'replicated': {}, 'passed_over': [], 'rematerialisations': [], 'traced': 1.0, 'resources': [],
    'model': {
        'total': 9, 'active': 9, 'embedding': 1, 'by_part': {'ffn': 9}, 'tokens': 4,
        'flops_per_token': 1.0, 'flops': 4.0,
    },
    'cublas': {
        'peak': 2**29, 'arguments': 30, 'activations': 0, 'temporaries': 5, 'largest': [], 'exchanges': [],
        'kernels': 1, 'gpu_kernels': [], 'compiled': 1.0,
        'estimate': {
            'compute': 1.0, 'memory': 1.0, 'exponentials': 1.0, 'nvlink': 1.0, 'network': 1.0, 'bound': 'memory',
            'hidden': 1.0, 'exposed': 1.0, 'measured': {},
        },
    },
}  # fmt: skip


def stub(monkeypatch, small=2**20):
    """Compiling takes no time: less recomputation is faster and larger, more devices of tensor slower."""

    def compiled(job):
        config = job['config']
        kept = {'none': 4, 'selective': 2, 'block': 1}[config['model']['remat']] * config['mesh']['tensor']
        one = FOUND['cublas'] | {'peak': small * kept, 'estimate': FOUND['cublas']['estimate'] | {'hidden': 1 / kept}}
        return FOUND | {'cublas': one, 'mesh': config['mesh'], 'products': job['products']}

    monkeypatch.setattr(planner, 'compile_apart', compiled)
