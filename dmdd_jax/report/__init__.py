"""The report: page, archive of its pictures, charts, overlays."""
