"""The errors that users meet. Each message says what was received, what is allowed, what to do."""


class AttentionPackError(ValueError):
    """Base of everything that this package raises because of what it was given."""


class ConfigError(AttentionPackError):
    """The configuration (flags, environment, additional-config) cannot be used."""


class PackFileError(AttentionPackError):
    """The pack file is missing, damaged, too new, or not a pack."""


class PackMismatchError(AttentionPackError):
    """The pack is sound but belongs to another model or parallel degree."""


class UnsupportedModelError(AttentionPackError):
    """The model uses an attention variant that cannot be served from a compacted cache."""


class CalibrationDataError(AttentionPackError):
    """The calibration or evaluation data cannot be used."""


class BudgetError(AttentionPackError):
    """The requested compression ratio cannot be met by this model."""


class UnsupportedVersionError(AttentionPackError):
    """The installed vLLM lacks an interface that this package needs."""
