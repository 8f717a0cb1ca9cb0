"""`tokbench card`: a tokenizer's records as metadata of its repository on the Hugging Face hub. Never imports torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokbench.errors import InputError, first_line
from tokbench.metrics import METRICS
from tokbench.records.files import slug, write_whole
from tokbench.records.result import EvalResult, read_result

IMAGENET = "ILSVRC/imagenet-1k"
MODEL_INDEX = "model-index.yml"


def write_card(
    paths: Sequence[Path], out: Path, benchmark: str | None, source: str | None, push: str | None
) -> list[Path]:
    """Write `.eval_results/*.yaml`, a file a record, and `model-index.yml` for cards of the older kind; the files.

    `benchmark` is the data set's name on the hub, by default what the record says (`hf:NAME`, ImageNet); `source` is an
    address where the record can be read. With `push` (OWNER/NAME) the `.eval_results` are offered to that repository by
    pull request. InputError for records of several tokenizers, a data set without a name on the hub, or a hub that
    cannot be reached.
    """
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [read_result(path) for path in paths]
    names = sorted({result.tokenizer.name for result in results})
    if len(names) != 1:
        raise InputError(f"a card is of one tokenizer, these records are of {', '.join(names)}")
    written = []
    for result in results:
        entries = _entries(result, benchmark or _on_the_hub(result), source)
        data = result.dataset
        target = out / ".eval_results" / f"{slug(f'tokbench-{result.protocol}-{data.name}-{data.resolution}')}.yaml"
        write_whole(target, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
        written.append(target)
    older = [row for result in results for row in _older(result, benchmark or _on_the_hub(result), source)]
    index = {"model-index": eval_results_to_model_index(names[0], older)}
    write_whole(out / MODEL_INDEX, yaml.safe_dump(index, sort_keys=False))
    if push:
        _offer(written, out, push)
    return [*written, out / MODEL_INDEX]


def _on_the_hub(result: EvalResult) -> str:
    name = result.dataset.name
    if name.startswith("imagenet"):
        return IMAGENET
    asked = result.provenance.command.partition("--data hf:")[2].split()
    if asked:
        return asked[0].partition("#")[0]
    raise InputError(f"{name}: what is this data set called on the hub? Say it with --benchmark OWNER/NAME")


def _measured(result: EvalResult) -> list[tuple[str, float]]:
    return [(name, v.value) for name, v in result.metrics.items() if v.value is not None and name in METRICS]


def _conditions(result: EvalResult) -> str:
    return (
        f"tokbench {result.provenance.tokbench}, protocol {result.protocol} ({result.protocol_fingerprint[:12]}), "
        f"N = {result.dataset.num_images}, {result.settings.dtype}"
    )


def _entries(result: EvalResult, benchmark: str, source: str | None) -> list[Any]:
    from huggingface_hub import EvalResultEntry

    where: dict[str, Any] = {"source_url": source, "source_name": "tokbench"} if source else {}
    task = f"{result.protocol}-{result.dataset.resolution}"
    return [
        EvalResultEntry(
            dataset_id=benchmark, task_id=f"{task}-{name}", value=value, date=result.provenance.date or None,
            notes=_conditions(result), **where,
        )
        for name, value in _measured(result)
    ]  # fmt: skip


def _older(result: EvalResult, benchmark: str, source: str | None) -> list[Any]:
    from huggingface_hub import EvalResult as Row

    data = result.dataset
    where: dict[str, Any] = {"source_url": source, "source_name": "tokbench"} if source else {}
    return [
        Row(
            task_type="image-to-image", task_name="image reconstruction", dataset_type=benchmark,
            dataset_name=f"{data.name} at {data.resolution} px", dataset_split=data.split, metric_type=name,
            metric_name=f"{name} ({_conditions(result)})", metric_value=value, **where,
        )
        for name, value in _measured(result)
    ]  # fmt: skip


def _offer(files: Sequence[Path], out: Path, repository: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    operations = [CommitOperationAdd(str(path.relative_to(out)), str(path)) for path in files]
    try:
        HfApi().create_commit(repository, operations, commit_message="Results measured with tokbench", create_pr=True)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(f"{repository}: no pull request ({first_line(error)}); the files are in {out}") from error
