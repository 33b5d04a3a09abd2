"""What `response_format` asks of generation."""

from collections.abc import Mapping
from typing import Any

from quantkit.server.schemas import JsonObjectFormat, JsonSchemaFormat, TextFormat


def schema_of(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Mapping[str, Any] | None:
    """The JSON schema that texts must fit; None: they may be anything. `strict` changes nothing: a schema always binds."""
    if isinstance(wanted, JsonSchemaFormat):
        return wanted.json_schema.schema_
    return {"type": "object"} if isinstance(wanted, JsonObjectFormat) else None
