"""Chat templates: which one a tokenizer brings, and whether a text is one. Without one that works, chats are refused."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def own_template(tokenizer: "PreTrainedTokenizerBase | None") -> tuple[str | None, str | None]:
    """The template that a tokenizer brings for ordinary chats, or ``None`` and, if it brings some all the same, why not."""
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
    """What keeps a text from being a Jinja template such as Hugging Face's tokenizers take, with its line."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag with which templates mark what the model has said; Hugging Face's tokenizers know it, Jinja does not."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols]).compile(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None
