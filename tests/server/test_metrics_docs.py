"""The page on metrics names what the server measures, and the request log's fields as they are."""

import json
import re
from pathlib import Path

from pagebrain.sampling_params import SamplingParams
from pagebrain.server.api.metrics import ServerMetrics
from pagebrain.server.api.request_log import MAX_USER_CHARACTERS, RequestLog
from pagebrain.server.link.streams import RequestStream

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def rows_below(heading: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def unit_of(name: str) -> str:
    """The unit that a name implies."""
    exceptions = {
        "pagebrain:kv_cache_usage_perc": "fraction",
        "pagebrain:held_answer_bytes": "bytes",
        "pagebrain:num_preemptions_total": "preemptions",
        "pagebrain:prefix_cache_queries_total": "tokens",
        "pagebrain:prefix_cache_hits_total": "tokens",
    }
    if name in exceptions:
        return exceptions[name]
    if name.startswith("pagebrain:num_requests"):
        return "sequences"
    if "_blocks" in name:
        return "blocks"
    if name.endswith("_bytes_total"):
        return "bytes"
    return "seconds" if name.endswith("_seconds") else "tokens" if "tokens" in name else "requests"


def test_the_table_is_what_the_registry_holds() -> None:
    families = list(ServerMetrics("m").registry.collect())
    names = [family.name + "_total" * (family.type == "counter") for family in families]
    expected = [[f"`{name}`", family.type, unit_of(name), family.documentation] for name, family in zip(names, families)]
    assert rows_below("What is measured") == expected


def test_every_query_names_a_metric_that_exists() -> None:
    samples = {sample.name for family in ServerMetrics("m").registry.collect() for sample in family.samples}
    asked = re.findall(r"pagebrain:\w+", PAGE.partition("\n## Questions to ask\n")[2])
    assert len(asked) >= 6 and set(asked) <= samples


def test_the_fields_of_the_request_log_are_described_and_shown() -> None:
    stream = RequestStream("r", (1,), SamplingParams(), on_close=lambda _: None)
    fields = list(RequestLog().entry(stream, "stop"))
    described = [name for row in rows_below("The request log") for name in re.findall(r"`(\w+)`", row[0])]
    (example,) = re.findall(r"^```json\n(.+)\n```$", PAGE, flags=re.MULTILINE)
    assert sorted(described) == sorted(fields) == sorted(json.loads(example))
    assert f"cut after {MAX_USER_CHARACTERS} characters" in PAGE
