"""Conba: the selective state space with state scaling, delayed states and an adaptive feedback gain.

MixCon (ECAI 2024), equations 5 to 14, in the parallel reading of docs/conba.md: gates and taps are functions of past
tokens, so that the recurrence stays linear in the state and runs as a scan.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixcon_jax.checks import ConfigError, divides, not_apart
from mixcon_jax.models.context import Context
from mixcon_jax.models.layers import (
    Aux,
    Parameters,
    State,
    constant,
    gated,
    keeping_arguments,
    narrow_gradient,
    ones,
    project,
    widened,
    zeros,
)
from mixcon_jax.models.mixers.feedback import Control, tracking_error
from mixcon_jax.models.mixers.ssm import ScanInputs, SelectiveSSM
from mixcon_jax.models.presets import CONBA_OFF
from mixcon_jax.options import POSITIVE, Check, Option, Statistic, at_least, between, one_of
from mixcon_jax.parallel.kernels import causal_conv1d, selective_scan

TITLE = 'Conba: gain and step'  # of the statistics' table
UNIT_SWISH = 1.2784645427610738  # swish(1 + W(1/e)) = 1: a scaling that starts as the identity


class Conba(SelectiveSSM):
    """Selective state space in a control loop; with the initial values it equals Jamba's Mamba mixer.

    Every mechanism is an option of ``config.model.conba``: ``state_scaling`` (eq. 7), ``delay`` (eq. 6), ``control``
    (eqs 10 and 11), ``gate`` (eq. 12) and noise (eqs 13 and 14).
    """

    OPTIONS = {
        'conba': {
            'state_scaling': Option(
                'output', 'Where the states are scaled (eq. 7).', one_of('none', 'output', 'readout')
            ),
            'delay': Option(
                'taps',
                'Delayed states (eq. 6): past outputs, one tap inside the loop, or a map of the state.',
                one_of('none', 'taps', 'companion', 'state'),
            ),
            'taps': Option(
                (1, 2, 4, 8),
                'Delays of delay="taps", in tokens.',
                Check(
                    lambda value: len(value) > 0 and all(v >= 1 for v in value) and len(set(value)) == len(value),
                    'distinct delays of at least 1',
                ),
                element=int,
            ),
            'control': Option('matrix', 'Adaptive feedback gain (eq. 11).', one_of('none', 'slow', 'diag', 'matrix')),
            'head_dim': Option(32, 'Channels P that share one gain.', POSITIVE),
            'reference': Option(
                'diag',
                'Desired output y_d (eq. 10): per-channel, zero, or a full projection.',
                one_of('zero', 'diag', 'proj'),
            ),
            'kappa': Option('free', 'Output mix of the gain: unconstrained, or a sigmoid.', one_of('free', 'bounded')),
            'feedback_iters': Option(0, "Passes of true feedback onto the scan's input.", between(0, 8)),
            'gate': Option('full', "Output gate: full SwiGLU (eq. 12) or Mamba's SiLU.", one_of('full', 'mamba')),
            'process_noise': Option(
                0.0, 'Standard deviation of w_k (eq. 13), training only.', at_least(0.0), learning=True
            ),
            'observation_noise': Option(
                0.0, 'Standard deviation of v_k (eq. 14), training only.', at_least(0.0), learning=True
            ),
            'gain_chunk': Option(32, 'Tokens a chunk of the matrix gain.', POSITIVE, free=True),
        }
    }
    STATISTICS = {
        'gain_norm': Statistic('Norm of the gain K at the end of a row.', TITLE),
        'correction': Statistic('Size of the correction kappa K e beside that of the output.', TITLE),
        'kappa': Statistic('Share of the correction that is applied.', TITLE),
        'alpha': Statistic("Step of the gain's update.", TITLE),
        'decay': Statistic('What remains of the gain at each token.', TITLE),
    }

    @staticmethod
    def check(model) -> None:
        options = model.conba
        if options.control != 'none':
            divides('model.conba.head_dim', options.head_dim, 'the inner width', model.ssm.expand * model.dim)
        elif options.feedback_iters:
            raise ConfigError(
                f'model.conba.feedback_iters={options.feedback_iters} feeds back a gain; choose a model.conba.control'
            )
        if options.control == 'slow' and options.kappa != 'free':
            raise ConfigError("model.conba.control='slow' learns its gain freely; set model.conba.kappa='free'")

    @staticmethod
    def check_split(model, shards) -> None:
        if model.conba.control != 'none':
            heads = model.ssm.expand * model.dim // model.conba.head_dim
            divides('mesh.tensor', shards['heads'], 'the inner width / model.conba.head_dim', heads)
        for noise in ('process_noise', 'observation_noise'):
            not_apart(shards, f'model.conba.{noise}', model.conba[noise])

    @classmethod
    def flops(cls, model, seq_len: int) -> float:
        """The scans' updates of their states, the gain's products, and maps of the state."""
        conba, inner, gain = model.conba, model.ssm.expand * model.dim, 0.0
        if conba.control == 'matrix':
            gain = inner * (4 * conba.head_dim + 4 * conba.gain_chunk)
        elif conba.control == 'slow':
            gain = 2 * inner * conba.head_dim
        # delay='state' is folded into C, once a token.
        readout = 2 * model.ssm.d_state**2 * (inner * (conba.state_scaling == 'readout') + (conba.delay == 'state'))
        scans = super().flops(model, seq_len) * (1 + conba.feedback_iters)
        return scans + gain * max(1, conba.feedback_iters) + readout

    @classmethod
    def exponentials(cls, model, seq_len: int) -> tuple[float, float]:
        """Those of every scan."""
        forward, backward = super().exponentials(model, seq_len)
        return forward * (1 + model.conba.feedback_iters), backward * (1 + model.conba.feedback_iters)

    @classmethod
    def without_additions(cls, model) -> Any:
        """Every mechanism off: Jamba's Mamba mixer, with its norms."""
        values = model.to_dict()
        values['conba'] |= CONBA_OFF | {'observation_noise': 0.0}
        return type(model)(values)

    def __init__(self, config, params: Parameters, num_layers: int) -> None:
        super().__init__(config, params, num_layers, norms=True)
        self.options = options = config.conba
        inner, d_state = self.inner, self.d_state
        if options.state_scaling == 'output':
            self.scale_weight = params('scale_weight', (inner,), ('inner',), zeros)
            self.scale_bias = params('scale_bias', (inner,), ('inner',), constant(UNIT_SWISH))
        elif options.state_scaling == 'readout':
            self.readout_weight = params('readout_weight', (d_state, d_state), ('state', 'state'), zeros)
            self.readout_bias = params('readout_bias', (d_state,), ('state',), constant(UNIT_SWISH))
        if options.delay == 'taps':
            self.taps = params('taps', (len(options.taps), inner), ('conv', 'inner'), zeros)
        elif options.delay == 'companion':
            self.companion_logit = params('companion_logit', (inner,), ('inner',), constant(-8.0))
        elif options.delay == 'state':
            self.delay_weight = params('delay_weight', (d_state, d_state), ('state', 'state'), zeros)
        if options.control != 'none':
            self.control = Control(config, inner, params.scope('control'))
        if options.gate == 'full':
            self.gate_output = params('gate_output', (inner,), ('inner',), zeros)
            self.gate_linear = params('gate_linear', (inner,), ('inner',), zeros)
        if options.observation_noise:
            self.observation_scale = params('observation_scale', (inner,), ('inner',), ones)

    def init_state(self, batch: int, max_len: int) -> State:
        """Returns the constant-size state; ``max_len`` is not needed."""
        state = super().init_state(batch, max_len)
        passes, scan = self.options.feedback_iters, state['scan']
        if self.options.delay == 'companion':
            scan = jnp.stack([scan, scan], axis=1)
        # Every feedback pass runs its own scan; all but the last also run their own gain.
        state['scan'] = jnp.stack([scan] * (passes + 1), axis=1)
        if self.options.delay == 'taps':
            state['taps'] = jnp.zeros((batch, max(self.options.taps), self.inner), jnp.float32)
        if self.options.control in ('diag', 'matrix'):
            state['gain'] = self.control.init_state(batch, passes or 1)
        return state

    def __call__(
        self, x: Float[Array, 'b t d'], context: Context, state: State | None
    ) -> tuple[Float[Array, 'b t d'], State | None, Aux]:
        options, old = self.options, state
        inputs = self.inputs(*self.halves(x), context, None if old is None else old['conv'])
        scans, gains, stats = [], [], {}
        u = inputs.u
        law = self.control.law(x, inputs.u, context) if options.control != 'none' else None

        # Feedback (Fig. 1): each pass measures the a-priori error, which is strictly causal, and corrects the drive.
        for i in range(options.feedback_iters):
            _, final, prior = self._scan(inputs, u, context, old, i, prior=True)
            correction, gain, stats = self.control.correction(
                prior, law, context, None if old is None else old.get('gain'), i
            )
            u = inputs.u - correction.astype(u.dtype)
            scans.append(final)
            gains.append(gain)
        y, final = self._scan(inputs, u, context, old, options.feedback_iters)
        scans.append(final)

        if context.train and context.rng is not None and options.observation_noise:
            noise = jax.random.normal(context.fold(1).rng, y.shape, y.dtype)
            y = y + options.observation_noise * self.observation_scale[...] * noise
        corrected = options.control != 'none' and not options.feedback_iters
        y, error, taps = self._shaped(y, law.reference if corrected else None, context, old)
        if corrected:
            correction, gain, stats = self.control.correction(
                y, law, context, None if old is None else old.get('gain'), 0, error
            )
            gains.append(gain)
            y = y - correction
        y = narrow_gradient(y, x.dtype).astype(x.dtype)
        if options.gate == 'full':
            y = full_gate(y, inputs.z, self.gate_output[...], self.gate_linear[...])
        else:
            y = gated(inputs.z, y)

        if old is not None:
            state = {'conv': inputs.conv_state, 'scan': jnp.stack(scans, axis=1)}
            if options.delay == 'taps':
                state['taps'] = taps.astype(old['taps'].dtype)
            if 'gain' in old:
                state['gain'] = jnp.stack(gains, axis=1)
        return project(y, self.out_proj), state, {'stats': stats} if stats else {}

    def _shaped(self, y: Float[Array, 'b t i'], reference: tuple | None, context: Context, state: State | None):
        """The scan's output after scaling and taps, its error where there is a reference, and the taps' state."""
        options = self.options
        scale = (self.scale_weight[...], self.scale_bias[...]) if options.state_scaling == 'output' else None
        weight = self.taps[...] if options.delay == 'taps' else None
        past = state['taps'] if state is not None and options.delay == 'taps' else None
        # Gradients between the fusions are rounded to what the scan's output is stored in, as that output's own is.
        narrow = y.dtype

        @keeping_arguments
        def shaped(y, scale, weight, past, reference, positions, mask):
            if scale is not None:
                y = y * jax.nn.silu(narrow_gradient(scale[0] * y + scale[1], narrow))
            if weight is not None:
                y, after = causal_conv1d(
                    y,
                    weight,
                    lags=tuple(options.taps),
                    residual=True,
                    positions=positions,
                    mask=mask,
                    initial_state=past,
                )
                past = None if past is None else after
            y = narrow_gradient(y, narrow)
            return y, None if reference is None else tracking_error(y, *reference), past

        return shaped(y, scale, weight, past, reference, context.positions, context.mask)

    def _scan(
        self,
        inputs: ScanInputs,
        u: Float[Array, 'b t i'],
        context: Context,
        state: State | None,
        i: int,
        prior: bool = False,
    ):
        """Runs pass ``i``: the selective scan of drive ``u`` with every in-loop option."""
        options = self.options
        extra: dict[str, Any] = {'prior': True} if prior else {}
        scaled = options.state_scaling == 'readout'
        extra['readout'] = (
            self.readout_weight[...] if scaled else None,
            self.readout_bias[...] if scaled else None,
            self.delay_weight[...] if options.delay == 'state' else None,
        )
        if options.delay == 'companion':
            extra['delay'] = jax.nn.sigmoid(self.companion_logit[...])
        if context.train and context.rng is not None and options.process_noise:
            # The same draw in every pass: the loop is one system seen several times.
            extra['process_noise'] = (context.fold(0).rng, options.process_noise)
        return selective_scan(
            u,
            inputs.dt,
            inputs.A,
            inputs.B,
            inputs.C,
            D=self.D[...],
            dt_bias=self.dt_bias[...],
            dt_softplus=True,
            reset=context.reset,
            initial_state=None if state is None else state['scan'][:, i],
            **extra,
            **self.scan_options,
        )


@keeping_arguments
def full_gate(
    y: Float[Array, '*b i'], z: Float[Array, '*b i'], output: Float[Array, ' i'], linear: Float[Array, ' i']
) -> Float[Array, '*b i']:
    """The output through its SwiGLU (eq. 12), in at least float32, rounded to the type of y."""
    wide, z = widened(y), widened(z)
    return (jax.nn.silu(wide * output + z) * (wide + z * linear)).astype(y.dtype)
