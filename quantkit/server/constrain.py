"""What `response_format` asks of generation."""

from quantkit.server.errors import ApiError
from quantkit.server.schemas import JsonObjectFormat, JsonSchemaFormat, TextFormat


def require_plain(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> None:
    """
    Raises:
        ApiError: anything but plain text is asked for.
    """
    if wanted is not None and wanted.type != "text":
        message = f"response_format {wanted.type} is not supported by this server; use text"
        raise ApiError(400, message, param="response_format", code="unsupported_value")
