"""Diffusion models: the denoising loss, and the output functions of D-TRAK.

Shape legend: B examples, S samples of noise and timestep per example, T timesteps of the schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import describe
from trak.errors import InputError
from trak.tasks.base import Task
from trak.tasks.noise import example_keys, normals, uniforms

PREDICTIONS = ("epsilon", "sample", "v_prediction")

Call = Callable[[nn.Module, Tensor, Tensor, Any], Any]
"""(model, noisy images [N, ...], timesteps int64 [N], conditioning or None) -> what the model predicts [N, ...]."""


@dataclass(frozen=True, eq=False)
class Diffusion(Task):
    """f = the mean over S noised copies of an image of a function of the model's prediction; the weight is 1.

    A noised copy is x_t = √ᾱ_t x + √(1 − ᾱ_t) ε. Its timesteps t, one from each of S equal parts of the schedule, and its noise ε are
    a pure function of `seed` and the image's values: the same at every checkpoint, in every batch, for a training image and for the same
    image as a target.

    `output` is one of these functions of the prediction ε_θ(x_t, t), with means over its entries:

    - "loss": −mean (ε − ε_θ)², minus the training loss, so that positive scores lower the target's loss;
    - "square": mean ε_θ², "average": mean ε_θ, "1-norm", "2-norm", "max-norm": the norms Σ|ε_θ|, √Σε_θ², max|ε_θ|: the alternatives
      of D-TRAK (Zheng et al., "Intriguing Properties of Data Attribution on Diffusion Models", ICLR 2024), of which "square" is the one
      they recommend. They are no losses: scores rank training images, and their size means nothing.

    Batches are images [B, ...], or (images, conditioning): conditioning is the model's third argument, a mapping is passed by name.

    Attributes:
        alphas_cumprod: ᾱ_t for t = 0 … T − 1, or a scheduler that has them under this name.
        output_function: see above.
        num_samples: S.
        seed: of noise and timesteps.
        prediction: what the model predicts: "epsilon", "sample" (x itself) or "v_prediction" (√ᾱ_t ε − √(1 − ᾱ_t) x); the loss compares
            with that.
        call: (model, noisy [N, ...], timesteps [N], conditioning) -> prediction, for models that are called in another way.

    Raises:
        InputError: impossible settings.
    """

    alphas_cumprod: Any = field(repr=False)
    output_function: str = "loss"
    num_samples: int = 10
    seed: int = 0
    prediction: str = "epsilon"
    call: Call | None = None
    _alphas_T: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_choice("output_function", self.output_function, ("loss", *_FUNCTIONS))
        _check_choice("prediction", self.prediction, PREDICTIONS)
        if (
            isinstance(self.num_samples, bool)
            or not isinstance(self.num_samples, int)
            or self.num_samples < 1
        ):
            raise InputError(f"num_samples must be a whole number ≥ 1; got {self.num_samples!r}")
        object.__setattr__(self, "_alphas_T", _alphas(self.alphas_cumprod))

    def output(self, model: nn.Module, batch: Any) -> Tensor:
        """F, [B]."""
        images, conditioning = _split(batch)
        timesteps_BS, noise = self.draw(images)
        alphas_BS = self._alphas_T.to(images.device)[timesteps_BS].to(images.dtype)
        alphas = alphas_BS.reshape(*alphas_BS.shape, *[1] * (images.ndim - 1))
        clean = images.unsqueeze(1)
        noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
        repeated = _repeated(conditioning, self.num_samples)
        predicted = (self.call or _call)(model, noisy.flatten(0, 1), timesteps_BS.flatten(), repeated)
        predicted = _checked(predicted, noisy.flatten(0, 1)).reshape(noisy.shape)
        if self.output_function == "loss":
            wanted = {
                "epsilon": noise,
                "sample": clean.expand_as(noisy),
                "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * clean,
            }[self.prediction]
            values_BS = -(predicted - wanted).flatten(2).square().mean(2)
        else:
            values_BS = _FUNCTIONS[self.output_function](predicted.flatten(2))
        return values_BS.mean(1)

    def draw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(timesteps int64 [B, S], noise [B, S, ...] in the images' dtype) of each image."""
        keys_B = example_keys(images, self.seed)
        steps = len(self._alphas_T)
        parts_S = torch.arange(self.num_samples, device=images.device)
        positions_BS = (parts_S + uniforms(keys_B, self.num_samples)) / self.num_samples
        timesteps_BS = (positions_BS * steps).long().clamp(0, steps - 1)
        entries = images[0].numel()
        noise = normals(keys_B, self.num_samples * entries).to(images.dtype)
        return timesteps_BS, noise.reshape(images.shape[0], self.num_samples, *images.shape[1:])

    def loss_weight(self, outputs: Tensor) -> Tensor:
        """Ones: f is the negative loss, or stands for it."""
        return torch.ones_like(outputs)

    @property
    def is_log_loss(self) -> bool:
        """No: the weights are 1."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """The settings, and a digest of the schedule."""
        call = None if self.call is None else getattr(self.call, "__qualname__", type(self.call).__qualname__)
        return {
            "task": "Diffusion",
            "output_function": self.output_function,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "prediction": self.prediction,
            "schedule": hashlib.sha256(self._alphas_T.numpy().tobytes()).hexdigest(),
            "call": call,
        }


# Of predictions [B, S, entries], giving [B, S].
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "square": lambda values: values.square().mean(2),
    "average": lambda values: values.mean(2),
    "1-norm": lambda values: values.abs().sum(2),
    "2-norm": lambda values: values.square().sum(2).sqrt(),
    "max-norm": lambda values: values.abs().amax(2),
}


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _alphas(schedule: Any) -> Tensor:
    """ᾱ as float64 [T] on the CPU."""
    values = getattr(schedule, "alphas_cumprod", schedule)
    try:
        alphas_T = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"alphas_cumprod must be numbers ᾱ_t for each timestep, or a scheduler with an attribute of that name; got {type(schedule).__name__}"
        ) from error
    if alphas_T.ndim != 1 or len(alphas_T) == 0 or not bool(((alphas_T >= 0) & (alphas_T <= 1)).all()):
        span = f" from {float(alphas_T.min()):.4g} to {float(alphas_T.max()):.4g}" if alphas_T.numel() else ""
        raise InputError(
            f"alphas_cumprod must be numbers between 0 and 1, one for each timestep; got {describe(alphas_T)}{span}"
        )
    return alphas_T


def _split(batch: Any) -> tuple[Tensor, Any]:
    images, conditioning = batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        images, conditioning = batch[0], batch[1] if len(batch) == 2 else None
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim < 2:
        raise InputError(
            f"diffusion expects batches images [batch, …] of floats, or (images, conditioning); got {describe(batch)}"
        )
    return images, conditioning


def _repeated(conditioning: Any, count: int) -> Any:
    """Each example's conditioning `count` times in a row."""
    if conditioning is None:
        return None
    if isinstance(conditioning, Mapping):
        return {name: _repeated(value, count) for name, value in conditioning.items()}
    # repeat_interleave of a tensor, written so that vmap knows it whatever its dtype.
    return conditioning.unsqueeze(1).expand(-1, count, *conditioning.shape[1:]).flatten(0, 1)


def _call(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Any:
    if conditioning is None:
        return model(noisy, timesteps)
    if isinstance(conditioning, Mapping):
        return model(noisy, timesteps, **conditioning)
    return model(noisy, timesteps, conditioning)


def _checked(predicted: Any, noisy: Tensor) -> Tensor:
    """The prediction, or what is called `sample` in it, as the models of diffusers give it."""
    values = getattr(predicted, "sample", predicted)
    if not isinstance(values, Tensor) or values.shape != noisy.shape:
        raise InputError(
            f"diffusion needs the model to predict a tensor like its noisy input, {list(noisy.shape)}; got {describe(values)}. For models that are "
            "called in another way, or give variances too, pass call=lambda model, noisy, timesteps, conditioning: …"
        )
    return values
