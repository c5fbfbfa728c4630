# Rscript plot.R ROWS.tsv PICTURE: bytes sent against held-out loss, with 95 % intervals over seeds.
suppressPackageStartupMessages(library(ggplot2))

arguments <- commandArgs(trailingOnly = TRUE)
rows <- read.delim(arguments[1])
rows$policy <- sub(":.*", "", rows$arm)
sending <- rows[rows$bytes > 0, ]
silent <- rows[rows$bytes == 0, ]

picture <- ggplot(sending, aes(bytes, loss, colour = policy)) +
  geom_hline(data = silent, aes(yintercept = loss, colour = policy), linetype = "dashed") +
  geom_text(data = silent, aes(x = min(sending$bytes), y = loss, label = arm), hjust = 0, vjust = -0.4, size = 2.6,
            show.legend = FALSE) +
  geom_errorbar(aes(ymin = loss - half, ymax = loss + half), width = 0.03, na.rm = TRUE) +
  geom_point(size = 2) +
  geom_text(aes(label = arm), hjust = -0.06, vjust = 1.3, size = 2.6, check_overlap = TRUE, show.legend = FALSE) +
  scale_x_log10(expand = expansion(mult = c(0.05, 0.35))) +
  labs(x = "bytes sent, over DDP's fp32 ring all-reduce", y = "held-out loss, nats per byte", colour = NULL) +
  theme_minimal(base_size = 11)
ggsave(arguments[2], picture, width = 9, height = 6)
