"""`--spec off`: every step gives one token per sequence."""

from quantkit.runtime.model.model_runner import open_model
from quantkit.runtime.speculative.opened_model import OpenedModel
from quantkit.runtime.speculative.proposers import SpecRequest


def open_without_drafts(request: SpecRequest) -> OpenedModel:
    """Load the model; nothing drafts for it.

    Raises:
        QuantkitError: the model cannot be loaded, or the cache is too small.
    """
    return OpenedModel(open_model(request.folder, request.device, request.cache), None)
