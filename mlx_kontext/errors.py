"""Everything mlx_kontext raises on purpose.

    KontextError
      RequestError(ValueError)   bad prompt, size, steps, mask, region
      ImageError                 a file that is not a usable image
      CheckpointError            no files, unknown or refused format, names/shapes/dtypes that do not fit
      AdapterError               a LoRA that does not fit
      ModelNotFound              missing, gated, offline; carries the next command to type
      ResourceError              memory or disk, before the work starts where it can be known
      SessionError               unreadable, locked, newer version
      SafetyRefusal              .stage (prompt | input | output), .reason

A message is one line: what was found, what was expected, what to do next. `exit_code` is what the command line returns.
"""

_LONGEST, _END = 390, 140  # letters of a message, and how many of them are kept of its end


class KontextError(Exception):
    """Base class: catching it catches every deliberate failure of this package."""

    exit_code = 1

    def __init__(self, message: str = ""):
        super().__init__(_one_line(message))


class RequestError(KontextError, ValueError):
    """The request itself cannot work: prompt, size, steps, guidance, an output path that is taken."""

    exit_code = 2


class ImageError(KontextError):
    """The input picture is missing, unreadable or of a kind that cannot be edited."""

    exit_code = 5


class CheckpointError(KontextError):
    """Weights, configuration or tokenizer files that are absent, damaged or of another model."""


class AdapterError(KontextError):
    """A LoRA that does not fit the model."""


class ModelNotFound(KontextError):
    """The model is not on this machine, or the hub will not hand it out; the message says what to type."""

    exit_code = 3


class ResourceError(KontextError):
    """Not enough memory or disk."""

    exit_code = 4


class SessionError(KontextError):
    """An edit session that cannot be read or written."""


class SafetyRefusal(KontextError):
    """A safety check refused or held the prompt, the input or the output."""

    exit_code = 6

    def __init__(self, stage: str, reason: str):
        super().__init__(f"{stage} refused: {reason}")
        self.stage, self.reason = stage, reason


def _one_line(text: str) -> str:
    """Printable and not too long, whatever a stranger's file puts into a message: that must not steer a terminal or fill it.

    The middle is left out: the file's name stands at the beginning, and what to do at the end.
    """
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - _END - 5]} ... {text[-_END:]}"
    return "".join(letter if letter.isprintable() else "?" for letter in text)
