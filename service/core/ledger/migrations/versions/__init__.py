"""The steps of the ledger schema, oldest first."""
