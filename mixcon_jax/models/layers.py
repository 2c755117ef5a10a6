"""What the layers share: named parameters, weighted losses, norms, a short convolution that respects documents."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from kernels_pallas.call import KEPT
from mixcon_jax.models.context import Context
from mixcon_jax.parallel.apart import total
from mixcon_jax.parallel.halves import halves
from mixcon_jax.parallel.kernels import causal_conv1d
from mixcon_jax.parallel.split import shards_of

Initializer = Callable[[PRNGKeyArray, Sequence[int]], Array]
Axes = tuple[str, ...]
State = dict[str, Any]
Aux = dict[str, dict[str, Any]]  # losses: name -> Loss; stats: name -> array


class Buffer(nnx.Variable):
    """State of a layer that no gradient trains, such as a routing bias."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """An auxiliary loss of a layer: what metrics show, and its weight beside the cross-entropy."""

    value: Any  # a scalar; of stacked blocks one each
    weight: float = dataclasses.field(default=1.0, metadata={'static': True})

    @staticmethod
    def mean(losses: Sequence['Loss']) -> 'Loss':
        """The mean over layers; where their weights differ, that of the values by their weights."""
        values, weight = [loss.value for loss in losses], losses[0].weight
        if any(loss.weight != weight for loss in losses):
            weight = sum(loss.weight for loss in losses) / len(losses)
            values = [loss.value * (loss.weight / weight) for loss in losses]
        return Loss(jnp.stack(values).mean(), weight)


class Parameters:
    """Makes parameters whose initial values are keyed by their names alone.

    Two architectures therefore start from the same values wherever they name a parameter alike, which pairs the arms
    of an ablation. Without a key all values are zeros: where shapes are all that is asked for, that is traced fast.
    """

    def __init__(self, key: PRNGKeyArray | None, path: str = '', index: int | Int[Array, ''] = 0) -> None:
        self._key, self._path, self._index = key, path, index

    @property
    def index(self) -> int | Int[Array, '']:
        """The layer's place in the whole model, for initial values that depend on it; it may be traced."""
        return self._index

    def scope(self, name: str) -> 'Parameters':
        """Returns the maker for a named part."""
        return Parameters(self._key, f'{self._path}{name}/', self._index)

    def layer(self, index: int | Int[Array, '']) -> 'Parameters':
        """Returns the maker for one layer of the whole model; its index may be traced."""
        return Parameters(self._key, f'{self._path}layer/', index)

    def __call__(
        self,
        name: str,
        shape: Sequence[int],
        axes: Axes,
        init: Initializer,
        decay: bool = True,
        rate: float = 1.0,
    ) -> nnx.Param:
        """Returns a float32 parameter.

        Args:
          name: within the layer; with the seed, the key of its initial values.
          shape: its sizes.
          axes: names of its dimensions, for sharding and optimizer groups.
          init: makes the initial values.
          decay: whether it shrinks by weight decay if it is a matrix, as nothing else does.
          rate: its learning rate, as a multiple of the optimizer's.
        """
        if len(shape) != len(axes):
            raise ValueError(f'parameter {name} has shape {tuple(shape)} but axes {axes}; name every dimension')
        if self._key is None:
            return nnx.Param(jnp.zeros(tuple(shape), jnp.float32), logical_axes=axes, decay=decay, rate=rate)
        # One fold for name and index together: a fold each would dominate the compile time of a small model.
        data = jnp.uint32(zlib.crc32((self._path + name).encode())) + jnp.uint32(self._index) * jnp.uint32(0x9E3779B1)
        value = init(jax.random.fold_in(self._key, data), tuple(shape))
        return nnx.Param(value, logical_axes=axes, decay=decay, rate=rate)


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape)


def uniform(bound: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def constant(value: float) -> Initializer:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


zeros, ones = constant(0.0), constant(1.0)


def step_sizes(options) -> Initializer:
    """Biases whose softplus is log-uniform in [dt_min, dt_max] of the options (Gu and Dao, 2023, §3.6)."""

    def init(key, shape):
        low, high = math.log(options.dt_min), math.log(options.dt_max)
        dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high)), options.dt_floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def output_std(init_std: float, num_layers: int) -> float:
    """Standard deviation of projections back onto the residual stream (two residual steps a layer)."""
    return init_std / math.sqrt(2 * num_layers)


def kept(x: Float[Array, '*b']) -> Float[Array, '*b']:
    """x, which the backward pass keeps, if it needs it, with ``model.remat='selective'``.

    What matrix products give has this mark (``project``), so that none is repeated, and the residual stream. GPU
    kernels' results are kept without it; all else is computed again.
    """
    return checkpoint_name(x, KEPT)


def widened(x: Float[Array, '*b']) -> Float[Array, '*b']:
    """x in at least float32, the type of sums."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def selective(primitive: Any, *args: Any, **params: Any) -> bool:
    """The policy of ``jax.checkpoint`` with ``model.remat='selective'``: keep what is marked, and kernels' results."""
    return primitive.name in KERNELS or _marked(primitive, *args, **params)


KERNELS = (
    'custom_vmap_call',
    'mpmd_map',
    'pallas_call',
)  # what Pallas's kernels are to a policy: plgpu.kernel the first
_marked = jax.checkpoint_policies.save_only_these_names(KEPT)


def keeping_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose gradient keeps its arguments as they are and computes what lies between once more.

    For elementwise functions of narrow arrays, bfloat16, that compute in float32: left to itself, autodiff keeps the
    float32 intermediates. What computes in the type of its first argument stays as it is. A matrix product that ends
    the function is not repeated, since its gradient needs only its factors.
    """
    again = jax.custom_vjp(function)

    def backward(args: tuple, gradient: Any) -> tuple:
        # Of `jax.checkpoint` the barrier holds the incoming gradient, too, which then is stored as wide as it comes.
        return jax.vjp(function, *jax.lax.optimization_barrier(args))[1](gradient)

    again.defvjp(lambda *args: (function(*args), args), backward)

    @functools.wraps(function)
    def call(x: Array, *args: Any) -> Any:
        return (function if widened(x).dtype == x.dtype else again)(x, *args)

    return call


def stored(x: Float[Array, '...']) -> Float[Array, '...']:
    """x; of a type narrower than sums it is what is stored that is read, and XLA does not compute it once more."""
    return x if widened(x).dtype == x.dtype else jax.lax.optimization_barrier(x)


def narrow_gradient(x: Float[Array, '...'], dtype: Any) -> Float[Array, '...']:
    """x, whose gradient is rounded to a type and stored in it, where x itself is wider and nowhere stored."""
    return x if x.dtype == dtype else _narrow_gradient(x, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _narrow_gradient(x, dtype):
    del dtype
    return x


def _narrow_gradient_backward(dtype, _, gradient):
    # Without the barrier XLA would take the two conversions for none.
    return (jax.lax.optimization_barrier(gradient.astype(dtype)).astype(gradient.dtype),)


_narrow_gradient.defvjp(lambda x, dtype: (x, None), _narrow_gradient_backward)


@keeping_arguments
def biased(x: Float[Array, '*b c'], bias: Float[Array, ' c']) -> Float[Array, '*b c']:
    """x plus a bias, in x's type; the bias's gradient, a sum over all tokens, is in float32."""
    return (widened(x) + bias).astype(x.dtype)


def swish_product(gate: Float[Array, '*b f'], up: Float[Array, '*b f']) -> Float[Array, '*b f']:
    """SiLU(gate) * up, in at least float32, rounded to the type of gate."""
    return (jax.nn.silu(widened(gate)) * widened(up)).astype(gate.dtype)


gated = keeping_arguments(swish_product)


@keeping_arguments
def gated_halves(both: Float[Array, '*b g']) -> Float[Array, '*b f']:
    """``gated`` of the halves of one array [..., 2 F], gate first, which is kept in one piece: two products in one."""
    return swish_product(*jnp.split(both, 2, axis=-1))


def over_rms(x: Float[Array, '*b d'], eps: float | Float[Array, '']) -> Float[Array, '*b d']:
    """Divides by the root mean square over the last axis, in the type of x."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


def over_deviation(x: Float[Array, '*b d'], eps: float) -> Float[Array, '*b d']:
    """Takes off the mean over the last axis, then divides by the standard deviation, in the type of x."""
    return over_rms(x - jnp.mean(x, -1, keepdims=True), eps)


@keeping_arguments
def rms_norm(x: Float[Array, '*b d'], scale: Float[Array, 'd'], eps: float | Float[Array, '']) -> Float[Array, '*b d']:
    """Divides by the root mean square over the last axis and scales, all in at least float32; keeps x's dtype."""
    wide = widened(x)
    return (over_rms(wide, eps) * scale.astype(wide.dtype)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), with a learned scale or without one."""

    def __init__(self, width: int, params: Parameters, eps: float, axis: str = 'norm', scale: bool = True) -> None:
        self.scale = params('scale', (width,), (axis,), ones) if scale else None
        self.eps = eps

    def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
        scale = jnp.ones(x.shape[-1:], jnp.float32) if self.scale is None else self.scale[...]
        return rms_norm(x, scale, self.eps)


@keeping_arguments
def layer_norm(
    x: Float[Array, '*b d'], scale: Float[Array, ' d'], bias: Float[Array, ' d'], eps: float | Float[Array, '']
) -> Float[Array, '*b d']:
    """``rms_norm`` of what is left without the mean over the last axis, and a bias."""
    wide = widened(x)
    centered = wide - jnp.mean(wide, -1, keepdims=True)
    return (rms_norm(centered, scale, eps) + bias.astype(wide.dtype)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Norm of mean 0 and variance 1 (Ba, Kiros and Hinton, 2016), with a learned scale and a learned bias."""

    def __init__(self, width: int, params: Parameters, eps: float, axis: str = 'norm') -> None:
        self.scale = params('scale', (width,), (axis,), ones)
        self.bias = params('bias', (width,), (axis,), zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, '*b d']) -> Float[Array, '*b d']:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)


NORMS = {'rms': RMSNorm, 'layer': LayerNorm}


def stream_norm(config, params: Parameters) -> nnx.Module:
    """A norm of the residual stream, of the kind that ``config.norm`` names."""
    return NORMS[config.norm](config.dim, params, config.norm_eps, axis='embed')


def project(x: Float[Array, '*b i'], weight: nnx.Param) -> Float[Array, '*b o']:
    """Multiplies by a weight matrix in x's dtype."""
    return kept(x @ weight[...].astype(x.dtype))


def project_halves(
    x: Float[Array, '*b i'], weight: nnx.Param, axis: str
) -> tuple[Float[Array, '*b o'], Float[Array, '*b o']]:
    """The two halves of ``project`` by a matrix [I, 2 * O], whose columns are of the logical axis ``axis``.

    In a type narrower than float32 they are two products: nothing is copied to part them, or to join their gradients,
    which are summed in float32 as those of one product. A mesh that splits the columns gives its first devices one half
    and its last the other. Here each gets its part of both: the matrix is exchanged, which spares exchanging what it
    gives.
    """
    if shards_of(axis, weight.shape[1] // 2) > 1:
        both = kept(jnp.einsum('...d,dhi->...hi', x, halves(weight[...].astype(x.dtype), axis)))
        return both[..., 0, :], both[..., 1, :]
    if widened(x).dtype == x.dtype:
        first, second = jnp.split(project(x, weight), 2, axis=-1)
    else:
        first, second = map(kept, _two_products(x, *jnp.split(weight[...], 2, axis=-1)))
    return first, second


@jax.custom_vjp
def _two_products(x, first, second):
    return x @ first.astype(x.dtype), x @ second.astype(x.dtype)


def _two_products_forward(x, first, second):
    return _two_products(x, first, second), (x, first, second)


def _two_products_backward(arguments, gradients):
    x, *weights = arguments
    wide = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx = sum(wide('...o,io->...i', g, weight.astype(x.dtype)) for g, weight in zip(gradients, weights, strict=True))
    return dx.astype(x.dtype), *(wide('...i,...o->io', x, g).astype(weights[0].dtype) for g in gradients)


_two_products.defvjp(_two_products_forward, _two_products_backward)


class ShortConv(nnx.Module):
    """Causal depthwise convolution as a sum of shifted tokens; ``weight[-1]`` meets the current token."""

    def __init__(self, width: int, channels: int, params: Parameters) -> None:
        self.width = width
        self.weight = params('weight', (width, channels), ('conv', 'inner'), uniform(width**-0.5))
        self.bias = params('bias', (channels,), ('inner',), zeros)

    def init_state(self, batch: int, dtype: Any) -> Float[Array, 'b k c']:
        return jnp.zeros((batch, self.width - 1, self.weight.shape[1]), dtype)

    def __call__(
        self,
        x: Float[Array, 'b t c'],
        context: Context,
        state: Float[Array, 'b k c'] | None,
        activation: str | None = None,
    ) -> tuple[Float[Array, 'b t c'], Float[Array, 'b k c'] | None]:
        return causal_conv1d(
            x,
            self.weight[...],
            self.bias[...],
            activation=activation,
            positions=context.positions,
            mask=context.mask,
            initial_state=state,
        )


def token_shift(
    x: Float[Array, 'b t c'], context: Context, state: Float[Array, 'b one c'] | None
) -> tuple[Float[Array, 'b t c'], Float[Array, 'b one c'] | None]:
    """The token before each, zero before a document's first, and the last token, which is the state."""
    return causal_conv1d(
        x,
        jnp.ones((1, x.shape[-1]), jnp.float32),
        lags=(1,),
        positions=context.positions,
        mask=context.mask,
        initial_state=state,
    )


@keeping_arguments
def mixed(x: Float[Array, '*b c'], before: Float[Array, '*b c'], share: Float[Array, ' c']) -> Float[Array, '*b c']:
    """A share of x for every channel, and the rest of what was before, in x's type."""
    return (widened(x) * share + widened(before) * (1 - share)).astype(x.dtype)


def masked_mean(x: Float[Array, 'b t *c'], context: Context) -> Float[Array, '']:
    """Mean over the real tokens and everything behind them."""
    mask = context.mask.reshape(context.mask.shape + (1,) * (x.ndim - 2))
    count = real_tokens(context).astype(jnp.float32) * math.prod(x.shape[2:])
    return total(jnp.sum(jnp.where(mask, x, 0).astype(jnp.float32))) / count


def real_tokens(context: Context) -> Int[Array, '']:
    """Their number in the whole microbatch, or 1."""
    return jnp.maximum(total(context.mask.sum()), 1)
