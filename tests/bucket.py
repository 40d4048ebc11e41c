"""The bucket that the object store of the attacks has, a server of this machine's own."""

BUCKET = "bucket"


def query(port: int) -> str:
    """Return how a URI says where the server is."""
    return f"endpoint_override=http://127.0.0.1:{port}&scheme=http"
