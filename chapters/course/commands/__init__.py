"""One module for each command of ``python -m chapters``; the underscore is because ``try`` is a word of Python."""
