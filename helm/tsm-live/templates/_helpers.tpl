{{/* KubeRay adds up to 20 letters to names and Kubernetes takes 63. */}}
{{- define "tsm.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 36 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 36 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tsm.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tsm.labels" -}}
{{ include "tsm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tsm.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "tsm.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "tsm.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end -}}

{{/* the store: host, secret, key */}}
{{- define "tsm.storeHost" -}}
{{- if .Values.redis.enabled -}}
{{ include "tsm.fullname" . }}-store
{{- else -}}
{{ required "externalRedis.host must be set when redis.enabled is false" .Values.externalRedis.host }}
{{- end -}}
{{- end -}}

{{- define "tsm.storePort" -}}
{{- if .Values.redis.enabled -}}6379{{- else -}}{{ .Values.externalRedis.port }}{{- end -}}
{{- end -}}

{{- define "tsm.storeSecret" -}}
{{- if .Values.redis.enabled -}}
{{ .Values.redis.existingSecret | default (printf "%s-store" (include "tsm.fullname" .)) }}
{{- else -}}
{{ .Values.externalRedis.existingSecret }}
{{- end -}}
{{- end -}}

{{- define "tsm.storeSecretKey" -}}
{{- if .Values.redis.enabled -}}
{{ .Values.redis.existingSecretPasswordKey }}
{{- else -}}
{{ .Values.externalRedis.existingSecretPasswordKey }}
{{- end -}}
{{- end -}}

{{- define "tsm.tokensSecret" -}}
{{- .Values.tokens.existingSecret | default (printf "%s-tokens" (include "tsm.fullname" .)) -}}
{{- end -}}

{{- define "tsm.encryptionSecret" -}}
{{- .Values.encryption.existingSecret | default (printf "%s-encryption" (include "tsm.fullname" .)) -}}
{{- end -}}

{{- define "tsm.storeScheme" -}}
{{- if and (not .Values.redis.enabled) .Values.externalRedis.tls -}}rediss{{- else -}}redis{{- end -}}
{{- end -}}

{{/* environment of every Ray container; the addresses hold the password only inside the pod */}}
{{- define "tsm.env" -}}
- { name: RAY_USAGE_STATS_ENABLED, value: "0" }
- { name: RAY_ENABLE_UV_RUN_RUNTIME_ENV, value: "0" }
- { name: RAY_AUTH_MODE, value: disabled } # Ray's ports are behind the NetworkPolicy
- { name: RAY_worker_niceness, value: "0" }
{{- end -}}

{{- define "tsm.serviceEnv" -}}
{{ include "tsm.env" . }}
{{- if .Values.proxy.haproxy }}
- { name: RAY_SERVE_ENABLE_HA_PROXY, value: "1" }
# a slow viewer holds up his own feed: from a thread of its own Serve would queue it, without bound
- { name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD, value: "0" }
{{- end }}
{{- $user := "" }}
{{- $database := 1 }}
{{- if not .Values.redis.enabled }}
{{- $user = .Values.externalRedis.username }}
{{- $database = .Values.externalRedis.database }}
{{- end }}
{{- $login := "" }}
{{- if include "tsm.storeSecret" . }}
{{- $login = printf "%s:$(STORE_PASSWORD)@" $user }}
- name: STORE_PASSWORD
  valueFrom:
    secretKeyRef: { name: {{ include "tsm.storeSecret" . }}, key: {{ include "tsm.storeSecretKey" . }} }
{{- end }}
- name: TSM_STORE__URL
  value: {{ printf "%s://%s%s:%s/%v" (include "tsm.storeScheme" .) $login (include "tsm.storeHost" .) (include "tsm.storePort" .) $database | quote }}
{{- if .Values.redis.enabled }}
- name: TSM_STORE__STATE_URL
  value: {{ printf "redis://%s%s-state:6379/0" $login (include "tsm.fullname" .) | quote }}
{{- end }}
- name: TSM_AUTH__ADMIN_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "tsm.tokensSecret" . }}
      key: {{ .Values.tokens.existingSecretAdminKey }}
- name: TSM_AUTH__VIEWER_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "tsm.tokensSecret" . }}
      key: {{ .Values.tokens.existingSecretViewerKey }}
- name: TSM_STORE__ENCRYPTION_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "tsm.encryptionSecret" . }}
      key: {{ .Values.encryption.existingSecretKey }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* what pods of the head and of the groups share; takes (dict "root" $ "pod" group) */}}
{{- define "tsm.placement" -}}
{{- with .pod.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .pod.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .pod.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- end -}}

{{- define "tsm.podMetadata" -}}
labels:
  {{- include "tsm.labels" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .pod.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .pod.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* resources with the GPUs in requests and limits; takes (dict "resources" ... "gpus" n) */}}
{{- define "tsm.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int .gpus) 0 -}}
{{- $gpu := dict "nvidia.com/gpu" (.gpus | toString) -}}
{{- $resources = mergeOverwrite $resources (dict "requests" $gpu "limits" $gpu) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "tsm.containerEnv" -}}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
env:
  {{- include .env .root | nindent 2 }}
  {{- with .pod.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with concat .root.Values.envFrom (.pod.envFrom | default list) }}
envFrom: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .root.Values.securityContext | nindent 2 }}
{{- end -}}

{{/* what Serve deploys: changed in place, without a new cluster */}}
{{- define "tsm.serveConfig" -}}
{{- $engine := .Values.config.engine | default dict -}}
{{- $deployments := list (dict "name" "Gateway" "num_replicas" .Values.gateway.replicas "ray_actor_options" (dict "num_cpus" 0.1)) -}}
{{- $deployments = append $deployments (dict "name" "Controller" "num_replicas" 2 "ray_actor_options" (dict "num_cpus" 0.1)) -}}
{{- if .Values.autoscaling.enabled -}}
{{- with .Values.autoscaling -}}
{{- $policy := dict "policy_function" "services.scaling:SlotsInUse" "policy_kwargs" (dict "target" .targetSlots) -}}
{{- $auto := dict "min_replicas" .minReplicas "max_replicas" .maxReplicas "initial_replicas" (max .minReplicas (min .maxReplicas ($engine.replicas | default 2) | int) | int) -}}
{{- $auto = merge $auto (dict "upscale_delay_s" .upscaleDelaySeconds "downscale_delay_s" .downscaleDelaySeconds "look_back_period_s" 10 "metrics_interval_s" 2 "policy" $policy) -}}
{{- $deployments = append $deployments (dict "name" "Engine" "autoscaling_config" $auto) -}}
{{- end -}}
{{- end -}}
{{- $app := dict "name" "tsm" "route_prefix" "/" "import_path" "services.app:cluster_application" "args" .Values.config "deployments" $deployments -}}
{{- $serve := dict "proxy_location" "EveryNode" "http_options" (dict "host" "0.0.0.0" "port" 8000) "applications" (list $app) -}}
{{- $serve = set $serve "logging_config" (dict "encoding" "JSON" "enable_access_log" false) -}}
{{- if .Values.grpc.enabled -}}
{{- $functions := list "services.rpc.cluster.add_streams" "services.rpc.cluster.add_inference" -}}
{{- $serve = set $serve "grpc_options" (dict "port" 9000 "grpc_servicer_functions" $functions "enable_reflection" .Values.grpc.reflection) -}}
{{- end -}}
{{- toYaml $serve -}}
{{- end -}}

{{/* mistakes that a schema cannot see */}}
{{- define "tsm.check" -}}
{{- $gpus := 0 -}}
{{- $cpus := 0 -}}
{{- range .Values.workerGroups -}}
{{- if .enabled -}}
{{- if .gpus -}}{{- $gpus = add $gpus 1 -}}{{- else -}}{{- $cpus = add $cpus 1 -}}{{- end -}}
{{- if or (lt (int .replicas) (int .minReplicas)) (gt (int .replicas) (int .maxReplicas)) -}}
{{- fail "a worker group's replicas must lie between its minReplicas and maxReplicas" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq 0 (add $gpus $cpus) -}}{{- fail "every worker group is disabled: enable workerGroups.cpu or workerGroups.gpu" -}}{{- end -}}
{{- if and (gt (float64 ((.Values.config.engine | default dict).num_gpus | default 0)) 0.0) (eq 0 (int $gpus)) -}}
{{- fail "config.engine.num_gpus is above 0 and no enabled worker group has GPUs: enable workerGroups.gpu" -}}
{{- end -}}
{{- if and .Values.proxy.haproxy (not .Values.networkPolicy.enabled) -}}
{{- fail "proxy.haproxy listens on all interfaces without a lock: keep networkPolicy.enabled, or set proxy.haproxy=false" -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- end -}}
