"""The kernel that service and worker share: settings, errors, jobs, ledger, spool, queue."""
