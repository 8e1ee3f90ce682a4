"""bergson: `CollectorComputer` with an `InMemoryCollector`, one factored projection for each linear layer, its default.

It takes Hugging Face's causal language models, so the case's GPT-2 is given to it as theirs with the same weights.
"""

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
from cases import matrix_layers, side
from datasets import Dataset
from protocol import Job, Prepared, serve
from transformers import GPT2Config, GPT2LMHeadModel


def hugging_face(job: Job) -> GPT2LMHeadModel:
    """The case's model in Hugging Face's code."""
    if job.case.kind != "lm":
        raise NotImplementedError("causal language models only")
    config = GPT2Config(
        **job.model.shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_new"
    )
    model = GPT2LMHeadModel(config).eval().to(job.device)
    ours = dict(job.model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = ours[name.removeprefix("transformer.")]
            parameter.copy_(
                weight.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else weight
            )
        difference = (model(job.inputs[:2]).logits - job.model(job.inputs[:2])).abs().max()
    if difference > 1e-3:
        raise ValueError(f"the two GPT-2 differ by {difference:.2g}")
    return model


def plain(job: Job) -> Prepared:
    """The plain pass of Hugging Face's code, to tell the model's speed from the method's."""
    model = hugging_face(job)

    def one_round() -> None:
        for inputs, labels in job.batches():
            job.case.losses(model(inputs).logits, labels).sum().backward()
            model.zero_grad(set_to_none=True)

    return Prepared(one_round, {"parameters": sum(p.numel() for p in model.parameters())})


def collect(job: Job) -> Prepared:
    model = hugging_face(job)
    layers = matrix_layers(job.model)
    width = side(job.dim, [job.dim] * len(layers))
    data = Dataset.from_dict({"input_ids": job.inputs.tolist(), "labels": job.labels.tolist()})
    config = IndexConfig(run_path=str(job.folder / "run"), projection_dim=width)
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    batches = [chunk.tolist() for chunk in torch.arange(len(data)).split(job.batch_size)]

    def one_round() -> None:
        collector = InMemoryCollector(
            model=model.base_model,
            data=data,
            cfg=config,
            processor=GradientProcessor(projection_dim=width),
        )
        CollectorComputer(
            model, data, collector=collector, batches=batches, cfg=config
        ).run_with_collector_hooks()

    parameters = sum(layer.weight.numel() for layer in layers.values())
    return Prepared(one_round, {"parameters": parameters, "kept": width**2 * len(layers)})


if __name__ == "__main__":
    serve({"collect": collect, "plain": plain})
