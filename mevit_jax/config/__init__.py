"""Configuration: frozen dataclasses that validate themselves, and the one function that changes a parsed config."""
