"""Looks up names of models and data sets before anything is loaded."""

import os

from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError


def check_name(flag: str, name: str, kind: str = "model", token: str | None = None) -> None:
    """Reject a name that is not a folder, not in the cache and not on the Hub.

    Without a network, the libraries that load it would retry for half a minute and log each attempt.

    Args:
        flag: The flag that has the name.
        kind: `"model"` or `"dataset"`.
        token: Token for the Hub. By default that of `hf auth login`.

    Raises:
        OSError: naming the flag, the name, and what was searched.
    """
    if os.path.isdir(name) or os.path.isdir(os.path.join(HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")):
        return
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10, token=token)
        return
    except (RepositoryNotFoundError, HFValidationError) as error:
        if isinstance(error, GatedRepoError):
            return  # is there; whoever loads it says how to get access
        why = f"no {kind} of the Hub has this name, or it is private (then `hf auth login`)"
    except HfHubHTTPError:
        return  # the server's trouble; whoever loads it tries again
    except Exception as error:  # the HTTP library's own, and `HF_HUB_OFFLINE`
        why = f"it is not in the cache and the Hub cannot be reached ({type(error).__name__})"
    raise OSError(
        f"`{flag}` is {name!r}: there is no such folder (relative paths start at {os.getcwd()}), and {why}. Check the "
        "name."
    )
