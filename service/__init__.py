"""What the hospital talks to: DICOM listener, REST interface, dashboard, intake. CPU only, carries bytes and never arrays."""
