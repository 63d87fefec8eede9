"""DICOM over the network, as the one who is called: listener and storage commitment."""
