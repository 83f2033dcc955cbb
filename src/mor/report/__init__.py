"""Reports: run folders as tables, curves and self-contained HTML pages.

In reading order:

    run_folder  what `mor train` has written: settings, measurements, final numbers
    run_page    the page of `mor report`: curves of several runs
    comparison  the page of `mor demo`: a model beside its vanilla twin
    html        tables, colored text, tabs and pages as HTML
    charts      line and bar charts as SVG
    palette     the colors of charts, of colored text and of the terminal
"""
