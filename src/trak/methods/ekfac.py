"""Influence functions by eigenvalue-corrected Kronecker factors.

Grosse et al.: "Studying Large Language Model Generalization with Influence Functions", 2023 (arXiv 2308.03296), sections 2.1 and 3; George,
Laurent, Bouthillier, Ballas, Vincent: "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018; Martens,
Grosse: "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015.

Shape legend: N training rows, T targets, P parameters, O outputs of a layer, I its inputs (and one for the bias).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trak import batches
from trak.errors import InputError, SingularGramError, UnsupportedLayerError
from trak.methods.base import Attributor, FittedAttributor
from trak.methods.curvature import LentLoss, check_loss, import_curvlinops, lent_loss
from trak.methods.gradient_passes import Passes, State, influence_attribution, start_passes
from trak.methods.runs import RunOptions, first_batch
from trak.methods.weights import resolve_exponent
from trak.precondition import Damping, FixedDamping, RelativeDamping
from trak.projection import Identity
from trak.results import Attribution
from trak.setting import prepare
from trak.tasks import resolve_task

_FISHERS = {"exact": "type-2", "sampled": "mc", "empirical": "empirical"}


@dataclass(frozen=True, eq=False, kw_only=True)
class EKFACInfluence(RunOptions, Attributor):
    """Influence functions with one Kronecker-factored block of the Gauss-Newton matrix for each layer; other arguments as in `trak.attribute`.

        τ(z_i, z) = −1/(M N) Σ_m Σ_l ∇_l f_m(z)ᵀ (G_l + λ_l I)⁻¹ ∇_l L_m(z_i),    G_l = (Q_A ⊗ Q_B) Λ_l (Q_A ⊗ Q_B)ᵀ

    Q_A and Q_B are the eigenvectors of the second moments of a layer's inputs (with a 1 for the bias) and of the loss gradients at its
    outputs; Λ is the second moment of the gradients in that basis (EK-FAC), or the product of the two's eigenvalues (K-FAC). Positions of
    a convolution or a sequence are taken for independent ("expand"). Linear and Conv2d layers are covered; attribute those, by
    `parameters=`. Scores have the sign and the units of `InfluenceFunction`'s, and need curvlinops.

    Only the targets' gradients are preconditioned, [T, P]; those of the training set are computed in one pass and not kept. For each
    checkpoint the factors of each layer stay in memory: O² + I² + O I numbers. `save_dir`, `projection` and `feature_dtype` have no use.

    Attributes:
        factors: "ekfac" or "kfac".
        fisher: whose gradients at the outputs: of labels drawn from the model's predictions ("sampled", the authors'), of all labels
            weighed by their probabilities ("exact", C backward passes for C classes), or of the observed ones ("empirical").
        samples: labels drawn for each example; for "sampled" only.
        damping: λ_l: `RelativeDamping(ratio)` times the mean of Λ_l, the authors' 0.1 by default, or one `FixedDamping` for all layers.
        seed: of the drawn labels.
        weight_exponent: γ of the weights q^γ in ∇L = −q^γ ∇f; 1 is the influence function. Other exponents, or None for `TRAK`'s default for
            the task, are for networks that have fitted their training set (see `TRAK`); scores are then in no units.
    """

    factors: str = "ekfac"
    fisher: str = "sampled"
    samples: int = 1
    damping: Damping = field(default_factory=lambda: RelativeDamping(0.1))
    seed: int = 0
    weight_exponent: float | None = 1.0

    def fit(self, train_set: Any, checkpoints: Sequence[Any] | None = None) -> FittedEKFACInfluence:
        """The factors of every layer at every checkpoint: two passes over the training set, one for K-FAC.

        Raises:
            InputError: impossible settings, or a task whose loss is unknown.
            UnsupportedLayerError: a parameter belongs to a layer that the approximation does not cover.
            MissingDependencyError: curvlinops is not installed.
            TrakError: anything wrong with the other arguments, the checkpoints or the gradients.
        """
        import_curvlinops("EKFACInfluence")
        self._check_settings()
        passes = start_passes(self, train_set, checkpoints)
        check_loss(passes.setting.task, "EKFACInfluence")
        layers = find_layers(passes.setting.model, passes.names)
        fitted = []
        for state in passes.states():
            with lent_loss(passes, state, "EKFACInfluence") as loss:
                _check_calls(loss, layers)
                fitted.append(self._factors(loss, layers))
        return FittedEKFACInfluence(self, passes, tuple(fitted))

    def _check_settings(self) -> None:
        if self.factors not in ("ekfac", "kfac"):
            raise InputError(f'factors must be "ekfac" or "kfac"; got {self.factors!r}')
        if self.fisher not in _FISHERS:
            raise InputError(f"fisher must be one of {', '.join(map(repr, _FISHERS))}; got {self.fisher!r}")
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 1:
            raise InputError(f"samples must be a whole number ≥ 1; got {self.samples!r}")
        if self.samples > 1 and self.fisher != "sampled":
            raise InputError(f'samples are drawn for fisher="sampled" only; got {self.fisher!r}')
        if not isinstance(self.damping, (RelativeDamping, FixedDamping)):
            raise InputError(
                f"damping must be trak.RelativeDamping(ratio) or trak.FixedDamping(damping); got {self.damping!r}"
            )
        resolve_exponent(self.weight_exponent, resolve_task(self.task))

    def _factors(self, loss: LentLoss, layers: Sequence[Layer]) -> tuple[LayerFactors, ...]:
        kind = {"ekfac": "EKFACLinearOperator", "kfac": "KFACLinearOperator"}[self.factors]
        operator = getattr(loss.library, kind)(
            loss.predictions,
            loss.loss,
            loss.parameters,
            loss.data(self.fisher == "empirical"),
            check_deterministic=False,
            seed=self.seed,
            fisher_type=_FISHERS[self.fisher],
            mc_samples=self.samples,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=loss.train.num_rows,
            batch_size_fn=lambda inputs: batches.batch_size(inputs["batch"]),
        )
        operator.compute_kronecker_factors()
        # Observed gradients scale with the loss, its second derivative once.
        scale = loss.scale**2 if self.fisher == "empirical" else loss.scale
        if self.factors == "kfac":
            found = operator.state_dict()
            return tuple(_kfac_layer(layer, found, scale) for layer in layers)
        operator.compute_eigenvalue_correction()
        found = operator.state_dict()
        return tuple(_ekfac_layer(layer, found, scale) for layer in layers)


@dataclass(frozen=True, eq=False)
class FittedEKFACInfluence(FittedAttributor):
    """See `EKFACInfluence`.

    Attributes:
        factors: of each layer, for each checkpoint.
    """

    method: EKFACInfluence
    passes: Passes
    factors: tuple[tuple[LayerFactors, ...], ...]

    def attribute(self, targets: Any) -> Attribution:
        """Scores [N, T]: a pass over the targets and one over the training set for every checkpoint.

        Raises:
            SingularGramError: a layer's damped block has no inverse.
            TrakError: anything wrong with the targets.
        """
        method = self.method
        exponent = resolve_exponent(method.weight_exponent, self.passes.setting.task)
        info = {
            "method": "EK-FAC influence function"
            if method.factors == "ekfac"
            else "K-FAC influence function",
            "fisher": method.fisher,
            "samples": method.samples,
            "seed": method.seed,
            "damping": method.damping.fingerprint(),
            "weight_exponent": exponent,
        }

        def solve(index: int, state: State, vectors_TP: Tensor) -> Tensor:
            return precondition(self.factors[index], vectors_TP, method.damping, self.passes.setting.shapes)

        return influence_attribution(self.passes, targets, solve, info, weight_exponent=exponent)


@dataclass(frozen=True)
class Layer:
    """An attributed module, and the names of those of its parameters that are attributed."""

    name: str
    weight: str | None
    bias: str | None


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """One layer's block in its eigenbasis.

    Attributes:
        layer: which.
        inputs: Q_A [I, I]; None where only the bias is attributed.
        outputs: Q_B [O, O].
        eigenvalues: Λ [O, I], of the mean loss; I = 1 where only the bias is attributed.
    """

    layer: Layer
    inputs: Tensor | None
    outputs: Tensor
    eigenvalues: Tensor


def find_layers(model: nn.Module, names: Sequence[str]) -> tuple[Layer, ...]:
    """The modules that the parameters belong to.

    Raises:
        UnsupportedLayerError: one is not covered; the message lists them, and says what to attribute instead.
    """
    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    uncovered: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if shared[id(getattr(module, leaf))] > 1:
            uncovered.append(f"{name} (used by several layers)")
        elif not _is_covered(module) or leaf not in ("weight", "bias"):
            uncovered.append(f"{name} ({type(module).__name__})")
        else:
            found.setdefault(owner, {})[leaf] = name
    if uncovered:
        shown = ", ".join(uncovered[:8]) + (", …" if len(uncovered) > 8 else "")
        patterns = [f"{owner}.*" if owner else "*" for owner in found]
        advice = "It covers none of these parameters: use InfluenceFunction, ArnoldiInfluence or TRAK"
        if patterns:
            listed = f"parameters=[{', '.join(map(repr, patterns))}]"
            if len(patterns) > 6:
                listed = 'e.g. parameters=[f"{name}.*" for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]'
            advice = f"Attribute the layers it covers: {listed}"
        raise UnsupportedLayerError(
            f"K-FAC covers Linear, and Conv2d without groups and with padding by zeros, and not {len(uncovered)} of the {len(names)} attributed "
            f"parameters: {shown}. {advice}"
        )
    return tuple(Layer(owner, named.get("weight"), named.get("bias")) for owner, named in found.items())


def precondition(
    factors: Sequence[LayerFactors],
    vectors_TP: Tensor,
    damping: Damping,
    shapes: Mapping[str, tuple[int, ...]],
) -> Tensor:
    """(G_l + λ_l I)⁻¹v_l of every layer's part of every vector, [T, P].

    curvlinops has the same with one λ for all layers; the authors take one for each.

    Raises:
        SingularGramError: a layer's damped block has no inverse.
    """
    placements = Identity().init(shapes).placements
    out_TP = torch.empty_like(vectors_TP)
    for block in factors:
        names = [name for name in (block.layer.weight, block.layer.bias) if name is not None]
        columns = [slice(placements[name].start, placements[name].stop) for name in names]
        inverse_OI = _inverse(block, damping)
        width = inverse_OI.shape[0]
        parts = [vectors_TP[:, part].to(inverse_OI).reshape(len(vectors_TP), width, -1) for part in columns]
        joint_TOI = torch.cat(parts, 2)
        joint_TOI = block.outputs.T @ joint_TOI
        if block.inputs is not None:
            joint_TOI = joint_TOI @ block.inputs
        joint_TOI = block.outputs @ (joint_TOI * inverse_OI)
        if block.inputs is not None:
            joint_TOI = joint_TOI @ block.inputs.T
        for part, solved in zip(columns, joint_TOI.split([part.shape[2] for part in parts], dim=2)):
            out_TP[:, part] = solved.reshape(len(vectors_TP), -1).to(out_TP)
    return out_TP


def _inverse(block: LayerFactors, damping: Damping) -> Tensor:
    """1 / (Λ + λ), [O, I]."""
    # Rounding leaves some of the smallest just below zero.
    eigenvalues_OI = block.eigenvalues.clamp_min(0)
    value = damping.damping if isinstance(damping, FixedDamping) else 0.0
    if isinstance(damping, RelativeDamping):
        value = damping.ratio * float(eigenvalues_OI.mean())
    smallest, largest = float(eigenvalues_OI.min()) + value, float(eigenvalues_OI.max()) + value
    if not smallest > torch.finfo(eigenvalues_OI.dtype).eps * largest:
        raise SingularGramError(
            f"layer {block.layer.name!r}: eigenvalues of its block run from {smallest:.3g} to {largest:.3g} with damping {value:.3g}, and the "
            "inverse is lost to rounding: raise damping, or leave the layer out of parameters= where its gradients are zero"
        )
    return 1 / (eigenvalues_OI + value)


def _kfac_layer(layer: Layer, found: Mapping[str, Any], scale: float) -> LayerFactors:
    key = _key(layer)
    output_values_O, outputs_OO = torch.linalg.eigh(found["gradient_covariances"][key])
    if layer.weight is None:
        return LayerFactors(layer, None, outputs_OO, scale * output_values_O.unsqueeze(1))
    input_values_I, inputs_II = torch.linalg.eigh(found["input_covariances"][key])
    return LayerFactors(layer, inputs_II, outputs_OO, scale * torch.outer(output_values_O, input_values_I))


def _ekfac_layer(layer: Layer, found: Mapping[str, Any], scale: float) -> LayerFactors:
    key = _key(layer)
    values = found["corrected_eigenvalues"][key]
    if isinstance(values, dict):
        # One of weight and bias alone, under its position.
        (values,) = values.values()
    outputs_OO = found["gradient_covariances_eigenvectors"][key]
    inputs_II = None if layer.weight is None else found["input_covariances_eigenvectors"][key]
    return LayerFactors(layer, inputs_II, outputs_OO, scale * values.reshape(len(outputs_OO), -1))


def _key(layer: Layer) -> str:
    return f"model.{layer.name}" if layer.name else "model"


def _is_covered(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _check_calls(loss: LentLoss, layers: Sequence[Layer]) -> None:
    """That each layer's `forward` runs once, on one positional tensor: moments are taken by hooks there.

    Raises:
        UnsupportedLayerError: another number of calls, or arguments by keyword.
    """
    calls: dict[str, list[int]] = {layer.name: [] for layer in layers}

    def count(name: str) -> Any:
        return lambda module, inputs: calls[name].append(len(inputs))

    handles = [loss.model.get_submodule(name).register_forward_pre_hook(count(name)) for name in calls]
    try:
        with torch.no_grad():
            loss.predictions({"batch": prepare(loss.setting, first_batch(loss.train))})
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in calls.items():
        if seen != [1]:
            how = f"called {len(seen)} times" if len(seen) != 1 else "called with keyword arguments"
            raise UnsupportedLayerError(
                f"layer {name!r} is {how} in a forward pass, and K-FAC's moments are of layers called once, with one positional argument: leave "
                "it out of parameters="
            )
