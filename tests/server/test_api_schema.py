"""Whatever the API's own schema allows, and much that it forbids: never an internal error, always what is documented."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import Served, environment

if os.environ.get("CI"):
    import schemathesis  # noqa: F401 -- where these tests must run, a missing tool is an error
else:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")

NUM_EXAMPLES = 25
"""Of each operation in the fuzzing phase; the coverage phase tries every bound and every kind of wrong value besides."""

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "negative_data_rejection"),
)


@pytest.mark.timeout(240)
def test_requests_made_from_the_schema_find_no_internal_error(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    settings = ("--num-blocks", "64", "--max-num-seqs", "16", "--max-model-len", "48", "--chat-template", str(template))
    with Served(*settings) as served:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        options = [
            "--phases=coverage,fuzzing",
            f"--max-examples={NUM_EXAMPLES}",
            f"--checks={','.join(CHECKS)}",
            "--no-color",
        ]
        options += ["--generation-deterministic", "--request-timeout=60"]
        done = subprocess.run(
            [*command, served.url + "/openapi.json", *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(),
            timeout=200,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert found is not None and int(found[1]) == int(found[2]) > 500, done.stdout[-3000:]
        served.wait_until(served.is_idle, "something was left in the engine")
        assert served.get("/health").status_code == 200
        assert not [line for line in served.lines if "Traceback" in line or "error:" in line]
