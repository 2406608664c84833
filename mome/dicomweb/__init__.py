"""A client of DICOMweb archives: retrieves a CT series and stores results. Importing this package imports nothing."""
