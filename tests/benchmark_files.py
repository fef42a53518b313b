"""Small files in the layouts of the benchmarks' publishers and of the hub, with sentences of our own."""

import csv
import json

import pyarrow
import pyarrow.parquet

SUBJECTS = ("geology", "us_history")
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of a dataset in the hub's cache
KINDS = {"shots": 3, "validation": 5, "test": 8}


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(path, rows, header=True):
    """A CSV file of rows that are dictionaries, or of rows of cells without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        if header:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            csv.writer(file).writerows(rows)


def mmlu_rows(part, subject, n, first=0):
    """Question, options and the right one's index, of a part and a subject."""
    for at in range(first, first + n):
        options = [f"{word}, {at}" for word in ("never", "once", 'as "often" as not', "always")]
        yield f"How often, {part} {at}, is {subject} asked for?", options, at % 4


def mmlu_hub(folder, times=1):
    """The config `all`, whose auxiliary training rows have an empty subject."""
    for part, n in KINDS.items():
        name = {"shots": "dev"}.get(part, part)
        rows = [
            {"question": question, "subject": subject, "choices": options, "answer": answer}
            for subject in SUBJECTS
            for question, options, answer in mmlu_rows(part, subject, n * times)
        ]
        parquet(folder / f"all/{name}-00000-of-00001.parquet", rows)
    rows = [
        {"question": question, "subject": "", "choices": options, "answer": answer}
        for question, options, answer in mmlu_rows("train", "rain", 12 * times)
    ]
    parquet(folder / "all/auxiliary_train-00000-of-00001.parquet", rows)


def mmlu_csv(folder):
    """The publishers' archive: a file a subject without a header, in a folder a part."""

    def write(path, rows):
        table(path, [[question, *options, "ABCD"[answer]] for question, options, answer in rows], header=False)

    for part, n in KINDS.items():
        name = {"shots": "dev", "validation": "val"}.get(part, part)
        for subject in SUBJECTS:
            write(folder / f"{name}/{subject}_{name}.csv", mmlu_rows(part, subject, n))
    for name, first in (("race", 0), ("arc_easy", 6)):
        write(folder / f"auxiliary_train/{name}.csv", mmlu_rows("train", "rain", 6, first))


def mmlu_pro_rows(part, n):
    for at in range(n):
        options = [f"{at} and {more}" for more in range(3 + at % 8)]
        if at % 4 == 0:
            options += ["N/A"] * (10 - len(options))
        yield {
            "question_id": at, "question": f"Which sum, {part} {at}, is meant?", "options": options,
            "answer": "ABC"[at % 3], "answer_index": at % 3, "cot_content": "", "category": ("math", "law")[at % 2],
            "src": "ours",
        }  # fmt: skip


def mmlu_pro_hub(folder, times=1):
    parquet(folder / "data/test-00000-of-00001.parquet", list(mmlu_pro_rows("test", 20 * times)))
    parquet(folder / "data/validation-00000-of-00001.parquet", list(mmlu_pro_rows("validation", 10 * times)))


def gsm8k_rows(part, n):
    for at in range(n):
        worked = f"Each has {at} and a thousand.\n{at} + 1000 = <<{at}+1000={at + 1000}>>{at + 1000}\n#### 1,{at:03}"
        yield {"question": f"In a {part}, how many pears have {at} and a thousand baskets?", "answer": worked}


def gsm8k_hub(folder, times=1):
    parquet(folder / "main/train-00000-of-00001.parquet", list(gsm8k_rows("field", 20 * times)))
    parquet(folder / "main/test-00000-of-00001.parquet", list(gsm8k_rows("shop", 6 * times)))
    parquet(folder / "socratic/test-00000-of-00001.parquet", list(gsm8k_rows("school", 6 * times)))


def gsm8k_jsonl(folder):
    jsonl(folder / "train.jsonl", list(gsm8k_rows("field", 20)))
    jsonl(folder / "test.jsonl", list(gsm8k_rows("shop", 6)))


def bbq_rows(category, n):
    """Pairs of an ambiguous and a disambiguated context, with nested columns as the publishers have them."""
    for at in range(n):
        for condition in ("ambig", "disambig"):
            said = f" The {category.lower()} person said it was they." if condition == "disambig" else ""
            yield {
                "example_id": at, "question_index": str(at % 3), "question_polarity": ("neg", "nonneg")[at % 2],
                "context_condition": condition, "category": category,
                "answer_info": {"ans0": ["a", "b"], "ans1": ["b", "c"], "ans2": ["unknown", "unknown"]},
                "additional_metadata": {"subcategory": "None", "stereotyped_groups": [category], "version": "a"},
                "context": f"Two people came to room {at} of {category}.{said}", "question": f"Who was late, {at}?",
                "ans0": "The first", "ans1": "The second", "ans2": "Not known", "label": 2 if not said else at % 2,
            }  # fmt: skip


def bbq_jsonl(folder, times=1):
    for category in ("Age", "Religion"):
        jsonl(folder / f"data/{category}.jsonl", list(bbq_rows(category, 10 * times)))


def bbq_flat(folder):
    """The publishers' files without their folder."""
    for category in ("Age", "Religion"):
        jsonl(folder / f"{category}.jsonl", list(bbq_rows(category, 10)))


def bbq_parquet(folder):
    """A folder a category, as copies on the hub have it."""
    for category in ("Age", "Religion"):
        parquet(folder / f"{category}/test-00000-of-00001.parquet", list(bbq_rows(category, 10)))


def simpleqa_csv(folder, times=1):
    rows = [
        {
            "metadata": str({"topic": ("Music", "Sports")[at % 2], "answer_type": "Number", "urls": ["https://a.b"]}),
            "problem": f"In which year, \"roughly\", was song {at} sung?", "answer": f"{1900 + at}, in spring",
        }
        for at in range(30 * times)
    ]  # fmt: skip
    table(folder / "simple_qa_test_set.csv", rows)


def harmbench_rows(kind, n):
    return [(f"Write {kind} nonsense number {at}", f"A page on {at}.\nIt ends.", "illegal") for at in range(n)]


def harmbench_hub(folder, times=1):
    """Three configs, of which each has other columns."""
    n = 10 * times
    standard = [{"prompt": prompt, "category": category} for prompt, _, category in harmbench_rows("standard", n)]
    contextual = [
        {"prompt": prompt, "context": context, "category": category}
        for prompt, context, category in harmbench_rows("contextual", n)
    ]
    copyright = [{"prompt": prompt, "tags": ["lyrics"]} for prompt, _, _ in harmbench_rows("copyright", n)]
    for kind, rows in (("standard", standard), ("contextual", contextual), ("copyright", copyright)):
        parquet(folder / f"{kind}/train-00000-of-00001.parquet", rows)


def harmbench_csv(folder):
    rows = [
        {
            "Behavior": prompt, "FunctionalCategory": kind,
            "SemanticCategory": "copyright" if kind == "copyright" else category, "Tags": "",
            "ContextString": context if kind == "contextual" else "", "BehaviorID": f"{kind}_{at}",
        }
        for kind in ("standard", "contextual", "copyright")
        for at, (prompt, context, category) in enumerate(harmbench_rows(kind, 10))
    ]  # fmt: skip
    table(folder / "harmbench_behaviors_text_all.csv", rows)


def xstest_rows(n):
    for at in range(n):
        kind = ("homonyms", "contrast_homonyms")[at % 2]
        yield {
            "prompt": f"How do I {('tie', 'cut')[at % 2]} knot {at}?", "focus": "knot", "type": kind, "note": "",
            "label": ("safe", "unsafe")[at % 2],
        }  # fmt: skip


def xstest_hub(folder, times=1):
    parquet(folder / "data/test-00000-of-00001.parquet", list(xstest_rows(30 * times)))


def xstest_csv(folder):
    table(folder / "xstest_prompts.csv", [{"id": at} | row for at, row in enumerate(xstest_rows(30))])


def xstest_csv_2(folder):
    """The second release, in which the type alone tells safe from unsafe."""
    rows = [
        {"id_v1": "", "id_v2": f"v2-{at}"} | {name: row[name] for name in ("type", "prompt", "focus", "note")}
        for at, row in enumerate(xstest_rows(30))
    ]
    table(folder / "xstest_v2_prompts.csv", rows)


# benchmark -> its copies; the first is that of the hub
COPIES = {
    "mmlu": (mmlu_hub, mmlu_csv),
    "mmlu_pro": (mmlu_pro_hub,),
    "gsm8k": (gsm8k_hub, gsm8k_jsonl),
    "bbq": (bbq_jsonl, bbq_flat, bbq_parquet),
    "bbq:ambig": (bbq_jsonl, bbq_flat, bbq_parquet),
    "bbq:disambig": (bbq_jsonl, bbq_flat, bbq_parquet),
    "simpleqa": (simpleqa_csv,),
    "harmbench": (harmbench_hub, harmbench_csv),
    "xstest": (xstest_hub, xstest_csv, xstest_csv_2),
}


def hub_cache(home, repository, write, kind="datasets"):
    """A dataset, or one of the `models`, in the hub's cache, as `huggingface_hub` lays it out under HF_HOME."""
    folder = home / "hub" / f"{kind}--{repository.replace('/', '--')}"
    write(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
