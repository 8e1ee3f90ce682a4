"""Mixtures of experts: what their per-example gradients cost, in plain passes over the same batch.

    python benchmarks/experts.py [--rounds 5] [--out benchmarks/results/experts.json]

Two small language models of two layers with 8 experts each, of which 2 see a token: experts as modules in a list, each of which is called
with the tokens that it is sent, and Hugging Face's Mixtral, whose experts are slices of one parameter. Gradients as `Auto` has them after
its check of the first batch, and as they are had without rules for experts: each mixture run again, one example after another. Every
round measures all in turn; medians of ratios to the plain pass. Needs transformers.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from featurize import measure
from records import RESULTS, clock_for, conditions, write_record
from torch import Tensor, nn
from torch.nn import functional as F

import trak
from trak.gradients import check_first_batch, model_state, select_parameters
from trak.gradients.hooked import Hooked
from trak.gradients.local import Local

WIDTH, INNER, EXPERTS, VOCABULARY = 128, 256, 8, 500


class Mixture(nn.Module):
    """Two of eight small networks for each token, weighted by a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        tokens = x_BTC.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            if len(rows):
                out = out.index_add(0, rows, expert(tokens[rows]) * weights[rows, places, None])
        return out.view_as(x_BTC)


class Layer(nn.Module):
    """Causal attention and a mixture, normalised before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.joint, self.out, self.mixture = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Mixture()

    def forward(self, x_BTC: Tensor) -> Tensor:
        parts = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in self.joint(self.norm_1(x_BTC)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        x_BTC = x_BTC + self.out(mixed)
        return x_BTC + self.mixture(self.norm_2(x_BTC))


class LanguageModel(nn.Module):
    """Experts as modules."""

    mixtures = ("layers.0.mixture", "layers.1.mixture")

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, VOCABULARY),
        )
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.words(tokens_BT))))


class Mixtral(nn.Module):
    """Experts as slices of one parameter, as transformers has them."""

    mixtures = ("model.model.layers.0.mlp.experts", "model.model.layers.1.mlp.experts")

    def __init__(self) -> None:
        super().__init__()
        import transformers

        self.model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=INNER,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=4,
                num_local_experts=EXPERTS,
                num_experts_per_tok=2,
                use_cache=False,
                pad_token_id=0,
                experts_implementation="eager",
            )
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.model(tokens_BT).logits


MODELS = {"experts as modules": LanguageModel, "Mixtral": Mixtral}


def likelihood(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """f: the mean log-likelihood of the next tokens, [B]."""
    (tokens,) = batch
    return -F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def one_by_one(source: Hooked, names: list[str], mixtures: tuple[str, ...]) -> Hooked:
    """`source` with a pass through every mixture, one example after another, for its experts' parameters."""
    passes = []
    for mixture in mixtures:
        own = [name for name in names if name.startswith(f"{mixture}.") and ".experts." in name]
        passes.append(Local(mixture, tuple((name, name) for name in own), one_by_one=True))
    return Hooked(local=(*source.local, *passes))


def ways_to_run(model: nn.Module, batch: tuple[Tensor]) -> dict[str, Callable[[], object]]:
    """The plain pass, and the gradients of every example by either way."""
    task = trak.CustomTask(likelihood, weight=torch.ones_like, name="likelihood")
    names, state = list(select_parameters(model, None)), model_state(model, None, "cpu")
    rules = check_first_batch(trak.Auto(), model, state, task, batch, names)

    def plain() -> None:
        likelihood(model, batch).sum().backward()
        model.zero_grad(set_to_none=True)

    def per_example(source: Hooked) -> Callable[[], object]:
        return lambda: source.compute(model, state, task, batch, names, lambda block: block.dense())

    loop = one_by_one(rules, names, model.mixtures)
    return {"plain": plain, "rules": per_example(rules), "one example after another": per_example(loop)}


def compare(
    functions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> tuple[float, dict[str, float]]:
    """(median seconds of the plain pass, median ratios of the others to it)."""
    plain = functions.pop("plain")
    for function in (plain, *functions.values()):
        function()
    ratios: dict[str, list[float]] = {name: [] for name in functions}
    seconds = []
    for _ in range(rounds):
        for name, function in functions.items():
            seconds.append(measure(plain, clock))
            ratios[name].append(measure(function, clock) / seconds[-1])
    return statistics.median(seconds), {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "experts.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock, results = clock_for(options.threads), {}
    for title in MODELS:
        torch.manual_seed(0)
        model = MODELS[title]().eval()
        batch = (torch.randint(3, VOCABULARY, (options.batch_size, options.tokens)),)
        functions = ways_to_run(model, batch)
        seconds, ratios = compare(functions, options.rounds, clock)
        results[title] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "plain_pass_seconds": seconds,
            "ratios": ratios,
            "rounds": options.rounds,
        }
        print(title, results[title], flush=True)
    shape = {"batch_size": options.batch_size, "tokens": options.tokens, "clock": clock.__name__}
    write_record(options.out, {**conditions(options.threads), **shape, "results": results})


if __name__ == "__main__":
    main()
