"""The ``memkv-engines`` command."""
