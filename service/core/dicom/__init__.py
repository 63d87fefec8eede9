"""What DICOM headers and messages say, one place each, for service and worker. No network, no database."""
