"""Files become series, and a series says by its headers what it is: planes, geometry, contrast agent, sequence."""
