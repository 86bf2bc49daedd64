"""``pagebrain serve``: what its options mean, and that each mistake is one line before anything is loaded."""

from pathlib import Path

import pytest

from pagebrain.cli import main
from pagebrain.cli.frame import OneLineParser
from pagebrain.cli.serve import add_arguments, server_settings
from pagebrain.errors import ConfigError
from pagebrain.server.options import ServerOptions


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEBRAIN_API_KEY", raising=False)


def settings_of(*arguments: str, model: str | None = None) -> ServerOptions:
    parser = OneLineParser(prog="test")
    add_arguments(parser)
    return ServerOptions(**server_settings(parser.parse_args(arguments), model))


def test_without_options_only_this_machine_is_served() -> None:
    options = settings_of()
    assert options == ServerOptions()
    assert (options.host, options.port, options.api_key, options.cors_origins) == ("127.0.0.1", 8000, None, ())
    assert not options.log_requests and not options.live_control
    assert not options.fair_queue and options.forwarded_allow_ips == ()


def test_every_option_arrives(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    line = (
        "--host ::1 --port 9 --served-model-name tiny --api-key k --cors-origin https://a.org --cors-origin http://b.org:1 "
        "--drain-seconds 2.5 --log-level debug --log-requests --live-control --max-body-bytes 5000 "
        f"--max-queued-requests 3 --max-queued-tokens 4 --chat-template {template} --fair-queue --keep-alive-seconds 7.5 "
        "--forwarded-allow-ips 10.0.0.1 --forwarded-allow-ips fd00::/8"
    )
    assert settings_of(*line.split()) == ServerOptions(
        host="::1",
        port=9,
        served_model_name="tiny",
        api_key="k",
        cors_origins=("https://a.org", "http://b.org:1"),
        chat_template="{{ messages }}",
        max_body_bytes=5000,
        max_queued_requests=3,
        max_queued_tokens=4,
        fair_queue=True,
        forwarded_allow_ips=("10.0.0.1", "fd00::/8"),
        keep_alive_s=7.5,
        drain_s=2.5,
        log_level="debug",
        log_requests=True,
        live_control=True,
    )


def test_the_model_is_served_under_its_name_unless_another_is_given() -> None:
    assert settings_of(model="openai-community/gpt2").served_model_name == "openai-community/gpt2"
    assert settings_of("--served-model-name", "small", model="openai-community/gpt2").served_model_name == "small"
    assert settings_of().served_model_name == "storyteller"


def test_the_key_comes_from_the_environment_and_the_option_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEBRAIN_API_KEY", "from-environment")
    assert settings_of().api_key == "from-environment"
    assert settings_of("--api-key", "given").api_key == "given"
    assert "given" not in repr(settings_of("--api-key", "given"))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--port 70000", "--port must be between 0 and 65535, got 70000"),
        ("--api-key=", "--api-key must not be empty"),
        ("--cors-origin example.org", "--cors-origin must look like https://example.org"),
        ("--cors-origin https://example.org/", "--cors-origin must look like https://example.org"),
        ("--max-body-bytes 10", "--max-body-bytes must be at least 1024, got 10"),
        ("--max-queued-requests 0", "--max-queued-requests must be at least 1, got 0"),
        ("--max-queued-tokens -1", "--max-queued-tokens must be at least 1, got -1"),
        ("--keep-alive-seconds 0", "--keep-alive-seconds must be more than 0 and finite, got 0.0"),
        ("--keep-alive-seconds inf", "--keep-alive-seconds must be more than 0 and finite, got inf"),
        ("--keep-alive-seconds soon", "--keep-alive-seconds"),
        ("--drain-seconds -1", "--drain-seconds must be at least 0"),
        ("--forwarded-allow-ips proxy", "--forwarded-allow-ips must be addresses or networks, or *; got 'proxy'"),
        ("--drain-seconds nan", "--drain-seconds must be at least 0"),
        ("--log-level loud", "--log-level must be one of critical"),
        ("--served-model-name=", "--served-model-name must not be empty"),
        ("--chat-template no/such/file", "--chat-template no/such/file cannot be read"),
        ("--host no.such.host.invalid", "is not an address of this machine"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--block-size 0", "block_size must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *line.split()]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("pagebrain: error: ") and said.count("\n") == 1


def test_white_space_in_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGEBRAIN_API_KEY", "secret\n")
    with pytest.raises(ConfigError, match="white space"):
        settings_of()
