"""From noise to a sample: time grids, guidance, solvers of the ODE, stochastic steps with likelihoods, few-step walks.

Time runs from 1 (noise) to 0 (clean). A model is any callable ``velocity(latents, t)``, closed over its condition.
"""

from lensmini.sampling.few_step import SimulatedStep, backward_simulation, few_step_sample
from lensmini.sampling.grids import empirical_mu, time_grid
from lensmini.sampling.guidance import guide
from lensmini.sampling.kernels import Kernel, Transition, sde_kernel
from lensmini.sampling.likelihood import gaussian_kl, gaussian_log_prob
from lensmini.sampling.noise import initial_noise, step_noise
from lensmini.sampling.ode import Velocity, dpm2, euler_step, heun_step, sample_ode
from lensmini.sampling.rollout import Replay, StochasticStep, replay_step, sample_sde, sde_window

__all__ = [
    "Kernel",
    "Replay",
    "SimulatedStep",
    "StochasticStep",
    "Transition",
    "Velocity",
    "backward_simulation",
    "dpm2",
    "empirical_mu",
    "euler_step",
    "few_step_sample",
    "gaussian_kl",
    "gaussian_log_prob",
    "guide",
    "heun_step",
    "initial_noise",
    "replay_step",
    "sample_ode",
    "sample_sde",
    "sde_kernel",
    "sde_window",
    "step_noise",
    "time_grid",
]
