"""Whether the Hugging Face hub answers: without a network its libraries would try for a minute before they say so."""

from __future__ import annotations

import threading

from fastalign._base.errors import UserError

SECONDS = 5.0  # to wait for an answer


def check_reachable(name: str, file: str, *, dataset: bool = False, hint: str) -> None:
    """Raise UserError, one line, within seconds, if a file of a model or data set is not in the hub's cache and the hub
    gives no answer. Any answer will do: the loader says what it means. hint: what else the name may have meant."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    kind = "dataset" if dataset else "model"
    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
            return
    except ValueError:  # no name of the hub
        return
    failed: list[str] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind), timeout=SECONDS)
        except HfHubHTTPError:
            pass
        except Exception as error:  # httpx's or requests', by the library's version
            failed.append((str(error).strip() or type(error).__name__).splitlines()[0])

    # A thread, because names that no server resolves, and several addresses, take longer than any timeout.
    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(SECONDS)
    if asking.is_alive() or failed:
        why = failed[0] if failed else f"no answer within {SECONDS:g} seconds"
        raise UserError(f"{name}: {hint}, and the hub cannot be reached: {why}")
