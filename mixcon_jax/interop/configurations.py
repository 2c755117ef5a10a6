"""What a published model's config.json says, as options of ``config.model``; what has no counterpart is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from mixcon_jax import config as configs
from mixcon_jax.errors import UserError

Options = dict[str, Any]
LONGEST = 2048  # tokens
UNBOUNDED = ([0.0, float('inf')], [0.0, {'__float__': 'Infinity'}])  # step sizes of Mamba-2, as files write it


class Given:
    """The values of a config.json, by ``model_type`` of Hugging Face transformers."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.architecture = values, values.get('model_type')

    def of(self, name: str, *default: Any) -> Any:
        """A value, or the default where there is none, or null.

        Raises:
          UserError: there is neither.
        """
        value = self.values.get(name)
        if value is None and not default:
            raise UserError(f'the config.json of {self.architecture} lacks {name}')
        return default[0] if value is None else value

    def count(self, name: str, *default: int) -> int:
        """A positive integer; as ``of``.

        Raises:
          UserError: it is something else, too.
        """
        value = self.of(name, *default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f'{name}={value!r} of {self.architecture} must be a positive integer')
        return value

    def number(self, name: str, *default: float) -> float:
        """A positive number; as ``of``.

        Raises:
          UserError: it is something else, too.
        """
        value = self.of(name, *default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float('inf'):
            raise UserError(f'{name}={value!r} of {self.architecture} must be a positive number')
        return float(value)

    def rules(self, *names: str) -> 'Given':
        """The first of these groups of values that there is, or none.

        Raises:
          UserError: it is no object.
        """
        name = next((name for name in names if self.of(name, None) is not None), names[0])
        value = self.of(name, {})
        if not isinstance(value, Mapping):
            raise UserError(f'{name}={value!r} of {self.architecture} must be an object')
        return Given({'model_type': self.architecture, **value})

    def only(self, **expected: Any) -> None:
        """Refuses values that ours cannot have; one that is not there is the architecture's, which ours is.

        Raises:
          UserError: names the first.
        """
        for name, value in expected.items():
            if (found := self.of(name, value)) != value:
                raise UserError(f'{name}={found!r} of {self.architecture} has no counterpart here, only {value!r}')


def read(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The configuration, resolved, of a run of a published model, but for ``tie_embeddings``, which its weights say.

    Args:
      values: its config.json.

    Raises:
      UserError: as of ``model_options``, or what it says does not go together.
    """
    config = configs.default()
    config.model.update(model_options(values))
    config.data.seq_len = context(values)
    return configs.resolve(configs.validate(config))


def model_options(values: Mapping[str, Any]) -> Options:
    """Options of ``config.model`` for a published model.

    Args:
      values: its config.json.

    Returns:
      Nested dicts of all that what it computes depends on, but for ``tie_embeddings``, which its weights say.

    Raises:
      UserError: an unknown architecture, or one of its options that ours lacks, named.
    """
    given = Given(values)
    if not isinstance(given.architecture, str) or given.architecture not in READERS:
        raise UserError(f'model_type {given.architecture!r} cannot be imported; choose from {", ".join(READERS)}')
    shared = {'vocab_size': given.count('vocab_size'), 'dim': given.count('hidden_size')}
    given.only(hidden_act='silu')
    return shared | READERS[given.architecture](given)


def context(values: Mapping[str, Any]) -> int:
    """Tokens of the rows that text is scored in by default: what the model was made for, and ``LONGEST`` at most."""
    stated = (values.get(name) for name in ('max_position_embeddings', 'context_length'))
    return next((min(max(each, 2), LONGEST) for each in stated if isinstance(each, int)), LONGEST)


def _blocks(layers: list[str]) -> Options:
    """The shortest pattern whose repeats are these layers."""
    count = len(layers)
    size = next(n for n in range(1, count + 1) if count % n == 0 and layers == layers[:n] * (count // n))
    return {'pattern': tuple(layers[:size]), 'num_blocks': count // size}


def _multiple(given: Given, inner: int) -> int:
    """The inner width as a multiple of the outer, which it must be here."""
    if inner % given.count('hidden_size'):
        raise UserError(f'an inner width of {inner} of {given.architecture} is no multiple of hidden_size')
    return inner // given.count('hidden_size')


def _attention(given: Given, rope: bool = True, share: float = 1.0, theta: float = 1e4) -> Options:
    """Heads and rotary positions, of which ``share`` and ``theta`` are those of a file that does not say them."""
    given.only(attention_bias=False)
    if given.of('sliding_window', 0):
        raise UserError(f'sliding_window of {given.architecture} has not been compared; only null can be imported')
    heads = given.count('num_attention_heads')
    head_dim = given.count('head_dim', given.count('hidden_size') // heads)
    found = {'num_heads': heads, 'num_kv_heads': given.count('num_key_value_heads', heads), 'head_dim': head_dim}
    if not rope:
        return found
    rules = given.rules('rope_scaling', 'rope_parameters')  # of older files and of newer ones; the first counts there
    if (kind := rules.of('rope_type', rules.of('type', 'default'))) != 'default':
        raise UserError(f'rotary positions of type {kind!r} of {given.architecture} have no counterpart here')
    width = int(head_dim * _first('partial_rotary_factor', share, rules, given))
    if width < 1:
        raise UserError(f'partial_rotary_factor of {given.architecture} leaves no channel of {head_dim} to rotate')
    theta = _first('rope_theta', theta, rules, given)
    return found | {'rope': True, 'rope_theta': theta, 'rope_dim': width if width < head_dim else 0}


def _first(name: str, default: float, *places: Given) -> float:
    """The number that the first of these says which says one."""
    return next((place.number(name) for place in places if place.of(name, None) is not None), default)


def _llama(given: Given) -> Options:
    given.only(mlp_bias=False)
    return _blocks(['attention+mlp'] * given.count('num_hidden_layers')) | {
        'norm_eps': given.number('rms_norm_eps'),
        'attention': _attention(given),
        'mlp': {'hidden_dim': given.count('intermediate_size')},
    }


def _moe(given: Given, experts: str, renormalize: bool) -> Options:
    return {
        'num_experts': given.count(experts),
        'top_k': given.count('num_experts_per_tok'),
        'hidden_dim': given.count('intermediate_size'),
        'renormalize': renormalize,
    }


def _mixtral(given: Given) -> Options:
    return _blocks(['attention+moe'] * given.count('num_hidden_layers')) | {
        'norm_eps': given.number('rms_norm_eps'),
        'attention': _attention(given, theta=1e6),
        'moe': _moe(given, 'num_local_experts', True),
    }


def _jamba(given: Given) -> Options:
    given.only(mamba_conv_bias=True, mamba_proj_bias=False)
    at = lambda kind, index: index % given.count(f'{kind}_layer_period') == given.of(f'{kind}_layer_offset')
    routed = lambda index: given.count('num_experts') > 1 and at('expert', index)
    layers = [
        f'{"attention" if at("attn", i) else "mamba"}+{"moe" if routed(i) else "mlp"}'
        for i in range(given.count('num_hidden_layers'))
    ]
    return _blocks(layers) | {
        'norm_eps': given.number('rms_norm_eps'),
        'attention': _attention(given, rope=False),
        'mamba': {'norms': True},
        'ssm': {
            'd_state': given.count('mamba_d_state'),
            'd_conv': given.count('mamba_d_conv'),
            'expand': given.count('mamba_expand'),
            'dt_rank': _rank(given, 'mamba_dt_rank'),
        },
        'mlp': {'hidden_dim': given.count('intermediate_size')},
        'moe': _moe(given, 'num_experts', False),
    }


def _rank(given: Given, name: str) -> int:
    return 0 if given.of(name) == 'auto' else given.count(name)


def _mamba(given: Given) -> Options:
    given.only(use_bias=False, use_conv_bias=True)
    width = given.count('hidden_size')
    return _blocks(['mamba'] * given.count('num_hidden_layers')) | {
        'norm_eps': given.number('layer_norm_epsilon'),
        'ssm': {
            'd_state': given.count('state_size'),
            'd_conv': given.count('conv_kernel'),
            # FalconMamba 7B has another expand, which its intermediate_size overrides.
            'expand': _multiple(given, given.count('intermediate_size', given.count('expand', 2) * width)),
            'dt_rank': _rank(given, 'time_step_rank'),
        },
    }


def _falcon_mamba(given: Given) -> Options:
    norms = {'norms': True, 'norm_scales': False, 'norm_eps': given.number('mixer_rms_eps', 1e-6)}
    return _mamba(given) | {'mamba': norms}


def _mamba2(given: Given) -> Options:
    given.only(use_bias=False, use_conv_bias=True)
    _require_unbounded(given)
    return _blocks(['mamba2'] * given.count('num_hidden_layers')) | {
        'norm_eps': given.number('layer_norm_epsilon'),
        'mamba2': {
            'd_state': given.count('state_size'),
            'd_conv': given.count('conv_kernel'),
            'expand': _multiple(given, given.count('num_heads') * given.count('head_dim')),
            'head_dim': given.count('head_dim'),
            'groups': given.count('n_groups'),
        },
    }


def _require_unbounded(given: Given) -> None:
    if given.of('time_step_limit', UNBOUNDED[0]) not in UNBOUNDED:
        raise UserError(f'time_step_limit of {given.architecture} has no counterpart here: step sizes have no bounds')


def _bamba(given: Given) -> Options:
    given.only(mamba_conv_bias=True, mamba_proj_bias=False, mlp_bias=False)
    _require_unbounded(given)
    attention = given.of('attn_layer_indices', [])
    kinds = ['attention' if i in attention else 'mamba2' for i in range(given.count('num_hidden_layers'))]
    inner = given.count('mamba_expand') * given.count('hidden_size')
    return _blocks([f'{kind}+mlp' for kind in kinds]) | {
        'norm_eps': given.number('rms_norm_eps'),
        'attention': _attention(given, share=0.5),
        'mamba2': {
            'd_state': given.count('mamba_d_state'),
            'd_conv': given.count('mamba_d_conv'),
            'expand': given.count('mamba_expand'),
            'head_dim': inner // given.count('mamba_n_heads'),
            'groups': given.count('mamba_n_groups'),
        },
        'mlp': {'hidden_dim': given.count('intermediate_size')},
    }


def _rwkv(given: Given) -> Options:
    given.only(layer_norm_epsilon=1e-5)  # its last norm has no other
    width = given.count('hidden_size')
    return _blocks(['rwkv4+rwkv_channel_mix'] * given.count('num_hidden_layers')) | {
        'norm': 'layer',
        'norm_eps': 1e-5,
        'embedding_norm': True,
        'rwkv4': {'inner_dim': given.count('attention_hidden_size', width)},
        'rwkv_channel_mix': {'hidden_dim': given.count('intermediate_size', 4 * width)},
    }


READERS: dict[str, Callable[[Given], Options]] = {
    'bamba': _bamba,
    'falcon_mamba': _falcon_mamba,
    'jamba': _jamba,
    'llama': _llama,
    'mamba': _mamba,
    'mamba2': _mamba2,
    'mixtral': _mixtral,
    'rwkv': _rwkv,
}
