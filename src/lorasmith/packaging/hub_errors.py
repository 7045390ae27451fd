"""What goes wrong between here and the hub, as our errors; never with a token in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorasmith.errors import MachineError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@contextmanager
def explained(repository: str, api: HfApi) -> Iterator[None]:
    """The hub's errors as ours. Its messages are not passed on whole: they may quote a request."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"{api.endpoint}/{repository}"
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise UsageError(
                f"the hub does not let you write there (HTTP {status})",
                where=where,
                expected="a token with the right to write",
                remedy="run `hf auth login` or set HF_TOKEN, and check the name",
            ) from None
        raise MachineError(
            f"the hub answers with an error (HTTP {status})",
            where=where,
            remedy="give the same command again later; what has arrived is kept",
        ) from None
    except OfflineModeIsEnabled:
        raise MachineError(
            "the hub is switched off here", where=where, remedy="unset HF_HUB_OFFLINE"
        ) from None
    except ValueError as error:
        if "README.md" not in str(error):
            raise
        raise UsageError(
            f"the hub does not accept the model card: {' '.join(str(error).split())}",
            where=where,
            remedy="the licence comes from the base's own card: correct it there and run again",
        ) from None
    except (ConnectionError, TimeoutError) as error:
        raise _unreachable(where, error) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise _unreachable(where, error) from None
        raise


def _unreachable(where: str, error: Exception) -> MachineError:
    return MachineError(
        f"the hub cannot be reached ({type(error).__name__})",
        where=where,
        remedy="check the network and HF_ENDPOINT, and give the same command again; what has arrived is kept",
    )
