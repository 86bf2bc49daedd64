"""The chapters' tests use the course tool's plugin, whether the tool runs them or pytest is called directly."""

import pytest


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Take the plugin in, with its options."""
    pluginmanager.import_plugin("chapters.course.plugin")
