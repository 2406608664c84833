"""DICOM objects made of masks: segmentations (SEG) and structure sets (RTSTRUCT) that refer to the scan's series."""
