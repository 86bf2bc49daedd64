"""Chat templates: finds a tokenizer's own, and checks that a text is a Jinja template."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def own_template(tokenizer: "PreTrainedTokenizerBase | None") -> tuple[str | None, str | None]:
    """The tokenizer's chat template, or ``None`` and, if it has templates that cannot be used, the reason."""
    own: object = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        if own and "default" not in own:
            names = ", ".join(sorted(map(str, own)))
            return None, f"the tokenizer has several chat templates ({names}), and none is called 'default'"
        own = own.get("default")
    if not own:
        return None, None
    mistake = template_mistake(own) if isinstance(own, str) else f"it is a {type(own).__name__}"
    return (None, f"the tokenizer's chat template is no Jinja template: {mistake}") if mistake else (str(own), None)


def template_mistake(text: str) -> str | None:
    """Why a text is not a Jinja template for Hugging Face's tokenizers, with the line; ``None`` if it is one."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag ``generation``, which marks the model's messages. It is defined by Hugging Face, not by Jinja."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).compile(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
