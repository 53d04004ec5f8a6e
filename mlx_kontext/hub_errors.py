"""What the hub and the way to it say, in one line that ends with the next command to type."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .cached import cache_folder
from .disk import explain
from .errors import KontextError, ModelNotFound


@contextmanager
def explained(repo: str, revision: str | None, verb: str = "pull") -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one line with the next command to type."""
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except KontextError:
        raise
    except (HTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        raise _explanation(error, repo, revision, verb) from None


def _explanation(error: Exception, repo: str, revision: str | None, verb: str) -> KontextError:
    from huggingface_hub import errors

    page, again = f"https://huggingface.co/{repo}", f"mlx-kontext models pull {repo}"
    again = again if verb == "pull" else "the same command again"
    inner = error.__cause__ if isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) else None
    if isinstance(inner, Exception):  # the hub's own words are wrapped in others
        return _explanation(inner, repo, revision, verb)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    fine = 'a fine-grained token also needs "Read access to contents of all public gated repos you can access"'
    if isinstance(error, errors.GatedRepoError) and status == 401:
        return ModelNotFound(
            f"{repo} is gated and you are not logged in (401): accept its licence at {page}, make a token at "
            f"https://huggingface.co/settings/tokens, type hf auth login, then: {again}"
        )
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"{repo} is gated and your account has no access yet ({status}): accept its licence at {page} with the account "
            f"of your token ({fine}), then: {again}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFound(f"{repo} has no revision {revision!r}; look at {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"the hub knows no {repo} ({status}), or it is private; check the name, or log in with: hf auth login"
        )
    if status == 401:
        return ModelNotFound(f"the hub refuses your token (401: wrong or expired); type hf auth login, then: {again}")
    if status == 403:
        need = "a token with write access" if verb == "upload" else fine
        return ModelNotFound(f"your token may not {verb} {repo} (403); {need}; type hf auth login, then: {again}")
    if status:
        return ModelNotFound(f"the hub answers {status} for {repo}; try again later with: {again}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ModelNotFound(f"HF_HUB_OFFLINE is set, so nothing goes online; type: HF_HUB_OFFLINE=0 {again}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return explain(error, cache_folder())
    told = (str(error).strip().splitlines() or [type(error).__name__])[0]
    told = re.sub(r"\?\S*", "", told)[:200]  # what follows in an address may be a signature
    return ModelNotFound(f"{repo}: the hub could not be reached, or the connection broke ({told}); type: {again}")
