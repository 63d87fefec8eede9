"""Server-rendered pages over the ledger for the people who operate the gateway."""
