"""What a GPU machine does with one study: read it, choose the pair, infer, write the derived series, deliver.

This is where the worker starts, so pydicom is told here, once, how to behave in it.
"""

import pydicom.config

# A misspelt keyword would vanish from a derived image without a word.
pydicom.config.INVALID_KEYWORD_BEHAVIOR = "RAISE"
# Real headers break rules of form; pydicom's warnings about them quote the values, which are patient data.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
