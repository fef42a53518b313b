"""Kinds of files: one that is right, what reads it, and what has to hold of what was accepted."""

import dataclasses
import functools
import json
import shutil

import tiny_pipeline
import torch
from fuzz.mutations import changed_bytes, changed_document, changed_lines, changed_safetensors

from corrsteer import CorrSteerError, Decoding, Run, SparseEncoder, Steering, Task, collect, select
from corrsteer.cli import settings
from corrsteer.ops import Moments
from corrsteer.rollouts.journal import Journal
from corrsteer.rollouts.regrading import join_rewards
from corrsteer.rollouts.rollout_file import read_rollouts, write_rollouts
from corrsteer.runs.activations import Block
from corrsteer.runs.journal import CollectionJournal
from corrsteer.stats.evidence import Evidence

CONFIG = b"""# of a collection
model: google/gemma-2-2b-it
sae: {20: "release:layer_20/width_16k", 3: somewhere}
task: task.jsonl
grader: {correct: exact, length: "my_graders:length"}
chat: true
max_new_tokens: 16
temperature: 0.5
permutations: 1000
score: [pearson, auroc]
"""


class Files:
    """Files that are right, in a folder, and one input of each kind."""

    def __init__(self, folder):
        self.folder = folder
        model, tokenizer, encoders = tiny_pipeline.model(), tiny_pipeline.tokenizer(), tiny_pipeline.encoders(d_sae=8)
        decoding = Decoding(2, batch_size=6)
        self.run = collect(
            model, tokenizer, encoders, tiny_pipeline.task(12), decoding=decoding, permutations=19, bootstrap=3,
            block_size=6, progress=False, scores=("pearson", "squared_ratio"),
        )  # fmt: skip
        self.run.save(folder / "run")
        streamed = collect(
            model, tokenizer, encoders, tiny_pipeline.task(12), decoding=decoding, permutations=19, bootstrap=3,
            block_size=6, keep_activations="never", progress=False,
        )  # fmt: skip
        streamed.save(folder / "streamed")
        select(self.run, encoders=encoders).save(folder / "s.safetensors")
        rows = [{"prompt": f"{n}+1", "answer": [str(n + 1), "x"], "topic": "a"} for n in range(4)]
        (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
        table = "id,reward,length\n" + "".join(f"{r.id},1,2.5\n" for r in self.run.rollouts)
        (folder / "rewards.csv").write_text(table)
        lines = [json.dumps({"id": r.id, "rewards": {"a": 1.0, "b": 0}}) for r in self.run.rollouts]
        (folder / "rewards.jsonl").write_text("\n".join(lines))
        (folder / "config.yaml").write_bytes(CONFIG)
        _save_sae(folder / "sae")
        self._journal()

    def _journal(self):
        with Journal(self.folder / "job", {"job": {"a": [1, 2]}}) as journal:
            journal.write("unit", '{"a": 1}\n["b", 2.5]\n')
        self.collecting = self.folder / "collecting"
        self._fresh_collecting()

    def _fresh_collecting(self):
        encoders = tiny_pipeline.encoders(d_sae=8)

        def stops(completion, example, seen=[]):  # noqa: B006
            seen.append(1)
            if len(seen) == 16:
                raise KeyboardInterrupt
            return tiny_pipeline.digits_up(completion, example)

        try:
            collect(
                tiny_pipeline.model(), tiny_pipeline.tokenizer(), encoders, tiny_pipeline.task(18, stops),
                decoding=Decoding(2, batch_size=3), permutations=19, block_size=6, progress=False,
                directory=self.folder / "going",
            )  # fmt: skip
        except CorrSteerError:
            pass
        shutil.copytree(self.folder / "going" / "collecting", self.collecting)

    def once(self, rng, kind):
        """One input of a kind; raises what reading it raises."""
        return getattr(self, kind)(rng)

    def _written(self, rng, name, change):
        path = self.folder / f"fuzzed.{name.rpartition('.')[2]}"
        path.write_bytes(change(rng, self._original(self.folder / name)))
        return path

    @staticmethod
    @functools.cache
    def _original(path):
        return path.read_bytes()

    def task(self, rng):
        path, category = self._written(rng, "task.jsonl", changed_lines), rng.choice((None, "topic"))
        task = Task.from_jsonl(path, "exact", category_field=category)
        task.grade(["1"] * len(task), task.examples)
        for example in task.examples:
            task.category(example)
        assert task.identity.samples == len(task) == task.samples()["n"]

    def rollouts(self, rng):
        path = self._written(rng, "run/rollouts.jsonl", changed_lines)
        rollouts = read_rollouts(path)
        write_rollouts(path, rollouts)
        assert read_rollouts(path) == rollouts

    def rewards(self, rng):
        name = rng.choice(("rewards.csv", "rewards.jsonl"))
        change = changed_bytes if name.endswith("csv") else changed_lines
        joined = join_rewards([r for r in self.run.rollouts if r], self._written(rng, name, change))
        assert all(one.rewards for one in joined)

    def config(self, rng):
        path = self._written(rng, "config.yaml", changed_bytes)
        kind = rng.choice((settings.CollectSettings, settings.EvaluateSettings, settings.RolloutsSettings))
        read = settings.read(kind, path, {"out": path} if "out" in kind.model_fields else {})
        assert isinstance(read.model, str)

    def steering(self, rng):
        path = self._written(rng, "s.safetensors", changed_safetensors)
        steering = Steering.load(path)
        steering.vectors()
        steering.save(path)
        assert Steering.load(path).digest == steering.digest

    def saved_run(self, rng):
        """A directory with one file changed, and what is asked of a run."""
        directory = self.folder / rng.choice(("run", "streamed"))
        path = rng.choice(sorted(directory.iterdir()))
        original = self._original(path)
        change = {".json": changed_document, ".jsonl": changed_lines}.get(path.suffix, changed_safetensors)
        try:
            path.write_bytes(change(rng, original))
            run = Run.load(directory)
            run.correlation(1)
            if run.testable():
                run.significance()
            for layer in run.points:
                if layer in run.evidence:
                    every = torch.arange(2, dtype=torch.int64, device="cpu")
                    run.interval(layer, run.pool, "delta", every)
            if run.rollouts:
                run.rollouts[0]
            if run.activations is not None:
                run.statistics(permutations=19, samples=range(len(run.rewards) - 1))
            select(run, encoders=tiny_pipeline.encoders(d_sae=8))
        finally:
            path.write_bytes(original)

    def moments(self, rng):
        moments = Moments.load(self._written(rng, "streamed/layer_1.max.safetensors", changed_safetensors))
        moments.merge(Moments(moments.d_sae, moments.n_labels))
        assert moments.correlation().shape == (moments.n_labels, moments.d_sae)

    def evidence(self, rng):
        name = "streamed/layer_1.max.evidence.safetensors"
        evidence = Evidence.load(self._written(rng, name, changed_safetensors))
        assert evidence.nbytes > 0 and evidence.n >= 0

    def activations(self, rng):
        block = Block.read(self._written(rng, "run/activations_0.safetensors", changed_safetensors))
        for layer, pool in ((1, "max"), (2, "last_prompt")):
            block.of(layer, pool).dense()

    def journal(self, rng):
        folder = self.folder / "job"
        path = folder / rng.choice(("manifest.json", "unit.jsonl"))
        original = self._original(path)
        try:
            path.write_bytes((changed_document if path.suffix == ".json" else changed_lines)(rng, original))
            with Journal(folder, {"job": {"a": [1, 2]}}) as journal:
                journal.read("unit")
        finally:
            path.write_bytes(original)

    def collection(self, rng):
        """What a collection that was stopped goes on from."""
        paths = [p for p in sorted(self.collecting.iterdir()) if p.suffix in (".jsonl", ".safetensors")]
        path = rng.choice(paths)
        original = self._original(path)
        devices = {layer: torch.device("cpu") for layer in (1, 2)}
        try:
            path.write_bytes((changed_lines if path.suffix == ".jsonl" else changed_safetensors)(rng, original))
            journal = CollectionJournal(_Names(self.collecting), devices)
            name = path.name.split(".residuals")[0].removesuffix(path.suffix)
            if name.startswith("block_"):
                block, residuals, _ = journal.read_block(int(name.removeprefix("block_")))
                block.of(1, "max").dense()
                assert residuals[1]["mean"].n >= 0
            else:
                number, at = map(int, name.removeprefix("batch_").split("."))
                assert journal.read(number, at).rollouts
        finally:
            path.write_bytes(original)

    def sae(self, rng):
        directory, name = self.folder / "sae", rng.choice(("cfg.json", "cfg.json", "sae_weights.safetensors"))
        path = directory / name
        original = self._original(path)
        try:
            path.write_bytes((changed_document if name == "cfg.json" else changed_safetensors)(rng, original))
            encoder = SparseEncoder.load(directory)
            assert encoder.decoder_rows([0]).shape[0] == 1
        finally:
            path.write_bytes(original)


@dataclasses.dataclass
class _Names:
    """Of a journal no more than where its units lie."""

    folder: object

    def path(self, name):
        return self.folder / f"{name}.jsonl"


def _save_sae(directory):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=6, d_sae=8))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(directory)


KINDS = ("task", "rollouts", "rewards", "config", "steering", "saved_run", "moments", "evidence", "activations",
         "journal", "collection", "sae")  # fmt: skip
