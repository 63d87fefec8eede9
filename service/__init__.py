"""What the hospital talks to: DICOM listener, REST, dashboard, intake. CPU only; carries bytes and never arrays."""
