"""The exceptions that every package raises for what a user can cure.

    MDFError
    ├── InputError              what was passed to a call
    │   ├── ImageError          the photograph
    │   └── TextError           the clinical text
    ├── EngineError             the engine directory
    │   ├── ManifestError       manifest.json is missing, malformed or of another version
    │   └── IntegrityError      a file is missing, altered, surplus, a link, or elsewhere
    │       └── SignatureError  the manifest is unsigned, or not signed by the trusted key
    ├── BackendError            the runtime below
    │   ├── BackendUnavailableError   not installed, or no such device
    │   ├── DeviceMemoryError         the card or the host has too little memory for the engine
    │   └── BackendRunError     it failed while loading or running a block
    ├── BusyError               the queue before the device is full, or the wait was too long
    ├── ClosedError             the classifier is closed, or another process's
    ├── MissingExtraError       a command or class needs an extra that is not installed
    ├── StorageError            the disk: full, or not writable
    ├── DataError               a data set (names row and column)
    ├── CheckpointError         a training checkpoint
    └── CertificateError        a parity certificate: it is none, or was altered or not signed

Every message says what was found, what was expected, and the command that cures it.
"""


class MDFError(Exception):
    """Base of all errors of this distribution."""


class InputError(MDFError, ValueError):
    """An argument of a call is unusable."""


class ImageError(InputError):
    """The photograph cannot be used."""


class TextError(InputError):
    """The clinical text cannot be used."""


class EngineError(MDFError):
    """The engine directory cannot be used."""


class ManifestError(EngineError):
    """manifest.json is missing, malformed, or of a version this SDK does not read."""


class IntegrityError(EngineError):
    """A file of the engine is not what the manifest says."""


class SignatureError(IntegrityError):
    """The manifest is unsigned, or its signature is not the trusted key's."""


class BackendError(MDFError):
    """The runtime that executes the blocks failed."""


class BackendUnavailableError(BackendError):
    """The backend or device asked for does not work on this machine."""


class DeviceMemoryError(BackendError):
    """The card or the host has too little free memory for the engine."""


class BackendRunError(BackendError):
    """A block failed to load or to run."""


class BusyError(MDFError):
    """Too many calls wait, or one waited too long."""


class ClosedError(MDFError):
    """The classifier was closed, or made by another process."""


class MissingExtraError(MDFError, ImportError):
    """A package that an extra brings is not installed."""


class StorageError(MDFError):
    """The disk is full, or cannot be written to."""


class DataError(MDFError, ValueError):
    """A data set breaks the format."""


class CheckpointError(MDFError):
    """A checkpoint directory cannot be used."""


class CertificateError(MDFError):
    """A parity certificate is malformed, altered, or not signed by the trusted key."""
