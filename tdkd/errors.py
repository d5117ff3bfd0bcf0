"""Errors that a user can mend."""

# where a package comes from; what is not here is a requirement of the trainer's
EXTRAS = {
    "triton": "triton",
    "transformers": "tdkd[train]",
    "trl": "tdkd[train]",
    "datasets": "tdkd[train]",
    "peft": "tdkd[train]",
    "rouge-score": "tdkd[train]",
    "matplotlib": "tdkd[train]",
}


class UserError(ValueError):
    """One line that names the argument, what was expected and what came.

    The command line prints it without a traceback and exits with code 2.
    """


def absent(error: BaseException) -> str | None:
    """The module whose absence an error is about, or was raised from in the first place."""
    name, cause = None, error.__cause__
    if isinstance(error, ModuleNotFoundError):
        name = error.name
    return (cause is not None and absent(cause)) or name


def missing(error: BaseException) -> ImportError:
    """One line that names what is missing and the command that installs it."""
    module = absent(error)
    if module is None:
        return ImportError(f'{error}: pip install "tdkd[train]"')
    name = module.split(".")[0]
    source = EXTRAS.get(name.replace("_", "-"), "tdkd[train]")
    return ModuleNotFoundError(f'{name} is missing: pip install "{source}"', name=module)
