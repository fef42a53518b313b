"""Train what the demo ships: the language model and one SAE per layer.

    python -m corrsteer.demo.train            # writes corrsteer/demo/model and corrsteer/demo/sae

It takes about a quarter of an hour on two CPU cores. The language model is a four-layer Llama of 0.86 million
parameters over single characters; the SAEs are trained on its residual stream by SAELens' own trainer
and saved in SAELens' own format.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from corrsteer.demo import sums

if TYPE_CHECKING:
    from transformers import BatchEncoding, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
CHARACTERS = [*"0123456789+=?\n", sums.CAREFUL[0], sums.SLOPPY[0]]
SPECIAL = ["<pad>", "<s>", "</s>"]
log: logging.Logger = logging.getLogger("corrsteer.demo.train")


def build_tokenizer() -> PreTrainedTokenizerBase:
    """A character tokenizer that `AutoTokenizer` loads; `<s>` starts every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The untrained language model. Its generation stops at the end of a line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    end: Any = tokenizer.convert_tokens_to_ids("\n")
    pad, start, stop = (cast(int, t) for t in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=start,
        eos_token_id=[end, stop],
    )
    return LlamaForCausalLM(config)


def batch_of_documents(tokenizer: PreTrainedTokenizerBase, rng: random.Random, n: int) -> BatchEncoding:
    """`n` documents, right-padded."""
    texts = [sums.document(rng) for _ in range(n)]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", return_token_type_ids=False)


def train_language_model(tokenizer: PreTrainedTokenizerBase, steps: int, batch: int, seed: int) -> LlamaForCausalLM:
    """Next-character prediction with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build_model(tokenizer)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=2e-3, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, s / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    for step in range(1, steps + 1):
        inputs = batch_of_documents(tokenizer, rng, batch)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            log.info("step %d: loss %.4f; follows its author: %s", step, loss.item(), follows(model, tokenizer))
            model.train()
    return model.eval()


@torch.inference_mode()
def follows(model: Any, tokenizer: PreTrainedTokenizerBase, n: int = 400) -> dict[str, float]:
    """Share of carry sums answered as the signing author would, and unsigned ones answered carefully."""
    model.eval()
    rng = random.Random(1)
    pairs = [(a, b) for a in sums.OPERANDS for b in sums.OPERANDS if sums.has_carry(a, b)]
    shares = {}
    for author in (sums.CAREFUL, sums.SLOPPY, None):
        chosen = rng.sample(pairs, n)
        inputs = tokenizer(
            [sums.prompt(a, b, author) for a, b in chosen], return_tensors="pt", return_token_type_ids=False
        )
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        writes = sums.WRITES[author or sums.CAREFUL]
        right = sum(text.split("\n")[0] == str(writes(a, b)) for text, (a, b) in zip(answers, chosen))
        shares[author or "unsigned"] = right / n
    return shares


@torch.inference_mode()
def residuals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n_documents: int, seed: int
) -> list[torch.Tensor]:
    """Each layer's output at every position of fresh documents: a list of `[tokens, hidden]`."""
    rng = random.Random(seed)
    kept: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.register_forward_hook(
            lambda _m, _i, out, at=at: kept[at].append(out[0] if isinstance(out, tuple) else out)
        )
        for at, layer in enumerate(model.model.layers)
    ]
    rows: list[torch.Tensor] = []
    for _ in range(0, n_documents, 256):
        inputs = batch_of_documents(tokenizer, rng, 256)
        model(**inputs)
        rows.append(inputs["attention_mask"].bool())
    for hook in hooks:
        hook.remove()
    return [torch.cat([out[mask] for out, mask in zip(layer, rows)]) for layer in kept]


def train_sae(
    activations: torch.Tensor, layer: int, d_sae: int, k: int, samples: int, seed: int, directory: Path
) -> None:
    """One top-k SAE by SAELens' trainer, on shuffled activations `[tokens, hidden]`."""
    from sae_lens import TopKTrainingSAEConfig, TrainingSAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    batch = 2048

    def provider():
        while True:
            for rows in torch.randperm(len(activations), dtype=torch.int64, device="cpu").split(batch):
                if len(rows) == batch:
                    yield activations[rows]

    config = TopKTrainingSAEConfig(d_in=activations.shape[1], d_sae=d_sae, k=k, rescale_acts_by_decoder_norm=True)
    config.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    config.metadata.hf_hook_name = f"model.layers.{layer}"
    config.metadata.model_name = "corrsteer-demo"
    config.metadata.prepend_bos = True
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=samples,
            device="cpu",
            autocast=False,
            lr=1e-3,
            lr_end=1e-4,
            lr_scheduler_name="cosineannealing",
            lr_warm_up_steps=100,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=batch,
            dead_feature_window=1000,
            feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=TrainingSAE.from_dict(config.to_dict()),
        data_provider=provider(),
    )
    sae = trainer.fit()
    sae.save_inference_model(str(directory))
    with torch.no_grad():
        x = activations[:20000]
        residual = x - sae.decode(sae.encode(x))
        explained = 1 - residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    log.info("layer %d: SAE explains %.3f of the variance", layer, explained)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--only", choices=("model", "sae"), help="train only one of the two")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--documents", type=int, default=20000, help="whose residuals the SAEs are trained on")
    parser.add_argument("--sae-samples", type=int, default=1_500_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    if args.only != "sae":
        tokenizer = build_tokenizer()
        model = train_language_model(tokenizer, args.steps, args.batch, args.seed)
        log.info("trained: %s", follows(model, tokenizer, n=1000))
        model.save_pretrained(args.out / "model")
        tokenizer.save_pretrained(args.out / "model")
    if args.only != "model":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.out / "model")
        model = AutoModelForCausalLM.from_pretrained(args.out / "model").eval()
        for layer, activations in enumerate(residuals(model, tokenizer, args.documents, args.seed + 1)):
            train_sae(
                activations, layer, args.d_sae, args.k, args.sae_samples, args.seed, args.out / "sae" / f"layer_{layer}"
            )


if __name__ == "__main__":
    main()
