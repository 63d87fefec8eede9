"""The method: arrays in, arrays out. No DICOM, no queue, no service."""
