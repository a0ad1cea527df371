"""What the guides promise, the tests that show it, and the page that says so (``docs/promises.md``)."""
